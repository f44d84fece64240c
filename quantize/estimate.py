"""The cost of a quantization: memory from what is held at once, time from the speed of this machine.

The estimates were compared with measured peaks; docs/quantize.md has them.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from quantize.blocks import STAGES
from quantize.calibration import GROUP
from quantize.solver import FULL, Method, quantize_weight
from qvl_edge.config import IMAGE_TOKENS, Config, QuantConfig, VisualConfig
from qvl_edge.errors import ConfigError
from qvl_edge.memory import device_memory, host_memory
from qvl_edge.model.loading import projections

PROGRAM = 600 << 20  # bytes of Python with torch and this package, and of what their allocators keep
_CONTEXT = {"host": 2 << 30, "device": 1 << 30}  # allowance for CUDA's own libraries and workspaces; not measured


def size(nbytes: float) -> str:
    """1.23 GB, or 4.5 MB below one gigabyte."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def duration(value: float) -> str:
    """90 s, 12 min or 3.4 h."""
    if value < 120:
        return f"{math.ceil(value)} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


@dataclass(frozen=True)
class Workload:
    """The sizes of a quantization that its cost depends on, and the device that it runs on."""

    config: Config
    quant: QuantConfig
    lengths: Sequence[int]  # tokens of each sample; none for rounding to nearest
    pictures: int  # different ones
    device: torch.device
    method: Method = FULL

    @property
    def on_cuda(self) -> bool:
        """Whether the work is done on a GPU."""
        return self.device.type == "cuda"

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of a block's projections."""
        return projections(self.config)

    @property
    def block_weights(self) -> int:
        """Weights of one block that are quantized."""
        return sum(outputs * inputs for outputs, inputs in self.layers.values())

    def block_bytes(self) -> int:
        """Peak of one block's work: its weights in float32, the levels found so far, and the larger of two things.

        While inputs are collected: the Hessian, the drift, and one sample's activations. While a projection is solved:
        the Hessian and the drift, and either two more matrices of the Hessian's size, or one and three of the weight's.
        """
        tokens, h, f = max(self.lengths, default=0), self.config.hidden_size, self.config.ffn_size
        activations = 4 * tokens * (8 * h + 4 * f)
        moments, solving = [], []
        for stage in STAGES:
            outputs, inputs = self.layers[stage[0]]
            largest = 4 * inputs * max(self.layers[name][0] for name in stage)
            hessian = 4 * inputs**2 if self.lengths else 0
            drift = 4 * inputs * min(outputs, inputs) if self.lengths and self.method.follow else 0
            moments.append(hessian + drift)
            solving.append(max(2 * hessian, hessian + 3 * largest) if self.lengths else 2 * largest)
        held = moments if self.quant.true_sequential else [sum(moments)] * len(moments)
        work = [kept + max(solver, activations) for kept, solver in zip(held, solving, strict=True)]
        return 5 * self.block_weights + max(work)

    def tower_bytes(self) -> int:
        """Peak of encoding the pictures: the largest part of the tower in float32, and a group's activations."""
        if not self.pictures:
            return 0
        visual, group = self.config.visual, min(self.pictures, GROUP)
        block = 4 * (4 * visual.width**2 + 2 * visual.width * visual.mlp_width)
        resampler = 4 * (4 * visual.output_dim**2 + visual.width * visual.output_dim)
        patches = 4 * group * visual.patches
        in_block = block + patches * (3 * visual.width + 2 * visual.mlp_width)
        return 4 * visual.output_dim**2 + max(in_block, resampler + patches * (visual.width + 5 * visual.output_dim))

    @property
    def host_bytes(self) -> int:
        """Peak of this process in the host's memory."""
        if not self.on_cuda:
            return PROGRAM + max(self.block_bytes(), self.tower_bytes())
        largest = max(outputs * inputs for outputs, inputs in self.layers.values())
        sample = 4 * max(self.lengths, default=0) * self.config.hidden_size
        return PROGRAM + _CONTEXT["host"] + 4 * largest + 2 * sample

    @property
    def device_bytes(self) -> int:
        """Peak on the GPU; 0 on the CPU."""
        return _CONTEXT["device"] + max(self.block_bytes(), self.tower_bytes()) if self.on_cuda else 0

    def check_memory(self) -> None:
        """ConfigError if the host or the GPU has too little free memory."""
        needed = self.host_bytes - PROGRAM  # the program itself is in memory already
        self._require("host", needed, host_memory().free, "" if self.on_cuda else ", use --device cuda")
        if self.on_cuda:
            self._require("GPU", self.device_bytes, device_memory(self.device).free, ", use --device cpu")

    def _require(self, where: str, needed: int, free: int, option: str) -> None:
        longest = max(self.lengths, default=0)
        shorter = f", or give a --seqlen below {longest}" if longest else ""
        if free < needed:
            raise ConfigError(
                f"quantizing this model takes about {size(needed)} of {where} memory, and {size(free)} is free; close "
                f"other programs{option}{shorter}"
            )

    def flops(self) -> float:
        """Floating-point operations in matrix products and factorizations."""
        layers, tokens = self.layers, sum(self.lengths)
        if not tokens:
            return 0.0
        attention = 2 * sum(length**2 for length in self.lengths) * self.config.hidden_size  # half is masked
        hessians = sum(2 * tokens * layers[stage[0]][1] ** 2 for stage in STAGES)
        forward = total = 0.0
        for stage in STAGES:  # every stage runs the block up to its own inputs
            if self.quant.true_sequential or stage is STAGES[-1]:
                total += forward
            forward += sum(2 * tokens * math.prod(layers[layer]) for layer in stage)
            forward += attention if stage is STAGES[0] else 0
        per_weight = 7 + 2 * self.method.sweeps  # updates and three errors; sweeps
        if self.method.follow:
            per_weight += 4  # the weight that makes up for the drift
            total += forward
            hessians += sum(2 * tokens * layers[s[0]][1] * min(layers[s[0]]) for s in STAGES)
        solver = sum(4 / 3 * inputs**3 + per_weight * outputs * inputs**2 for outputs, inputs in layers.values())
        block = total + forward + hessians + solver
        return self.config.num_hidden_layers * block + self.pictures * _tower_flops(self.config.visual)

    def seconds(self) -> tuple[float, float]:
        """An estimate of the time in seconds, and the FLOP/s it is based on, from short runs on this device."""
        width = min(max(self.config.hidden_size, 256), 2048)
        a, b = (torch.randn(width, width, device=self.device) for _ in range(2))

        def product() -> None:
            for _ in range(3):
                torch.mm(a, b)

        group = QuantConfig().group_size
        sample, hessian = torch.randn(width, group, device=self.device), torch.eye(group, device=self.device)

        def solve() -> None:
            quantize_weight(sample, hessian, QuantConfig())

        rate = 3 * 2 * width**3 / self._time(product)
        per_weight = self._time(solve) / sample.numel()  # seconds for what is not a product: grids, columns
        weights = self.config.num_hidden_layers * self.block_weights
        return self.flops() / rate + weights * per_weight, rate

    def _time(self, function: Callable[[], None]) -> float:
        """Seconds of the fastest of three runs: other programs, and the first run's own costs, only add to it."""
        times = []
        for _ in range(3):
            start = time.perf_counter()
            function()
            if self.on_cuda:
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - start)
        return min(times)


def _tower_flops(visual: VisualConfig) -> float:
    """Of one picture."""
    block = 2 * (4 * visual.width**2 + 2 * visual.width * visual.mlp_width) + 4 * visual.patches * visual.width
    resampler = 2 * visual.output_dim * (visual.width + 2 * visual.output_dim) + 4 * IMAGE_TOKENS * visual.output_dim
    return float(visual.patches * (visual.layers * block + resampler))
