"""Memory use of a running model, estimated part by part before anything is loaded; and what to change to make it fit.

Every part is computed from the config; the few constants say how they were found. `benchmarks.memory` compares the
estimate with a real run.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

import torch

from kernels.cpu import padded_group
from kernels.cpu_attention import FLOATS_AT_ONCE
from kernels.gpu.weight import CHUNK, TILE
from kernels.matmul_nbits import block_size
from qvl_edge.config import Config
from qvl_edge.engine.graph import GRAPH_BYTES, MAX_GRAPHS, buckets_of, counts_of
from qvl_edge.engine.slots import CHUNK as PREFILLED
from qvl_edge.errors import ConfigError, FitError
from qvl_edge.model.loading import projections
from qvl_edge.options import PROFILES, Activations, Embeddings, Head, KVType, Vision
from qvl_edge.vision.memory import session_bytes, workspace_bytes

MIN_CONTEXT = 512  # positions that a profile has to leave room for: an image, a question and an answer
PREFERRED_CONTEXT = 2048  # positions that "auto" prefers to exactness


@dataclass(frozen=True)
class Plan:
    """How a model runs: `context` positions in each of `slots`, `images` encoded at once."""

    device: str  # "cpu" or "cuda"
    dtype: torch.dtype  # compute dtype
    vit: str = "float16"
    head: Head = "float16"
    kv_cache: KVType = "float16"
    activations: Activations = "float"
    embeddings: Embeddings = "host"
    vision: Vision = "resident"
    context: int = PREFERRED_CONTEXT
    images: int = 1
    slots: int = 1
    openvino: bool = False  # encodes the images of a model on the CPU
    turing: bool = False  # a card whose prompts go through one dequantized projection at a time

    def precision(self, part: Literal["head", "kv_cache"]) -> str:
        """What a part is in, for people: float16 stands for the compute dtype, which is float32 on most CPUs."""
        named: str = getattr(self, part)
        return str(self.dtype).removeprefix("torch.") if named == "float16" else named


@dataclass(frozen=True)
class Budget:
    """Bytes of every part. `workspace` is the peak of temporary memory over all stages."""

    layers: int
    embeddings: int
    head: int
    vision: int
    kv_cache: int
    workspace: int
    runtime: int

    @property
    def total(self) -> int:
        """Bytes of all parts: the peak."""
        return sum(vars(self).values())


# Before a model is loaded. On a CPU: Python with torch, onnxruntime and this package, VmRSS 246 MB (torch 2.13, x86);
# tiktoken takes 350 bytes a rank. On CUDA: context, Triton's kernels and cuBLAS's workspace; a figure that
# others report for CUDA 12 and 13; it was not measured here.
_RUNTIME = {"cpu": 250 << 20, "cuda": 450 << 20}
_BYTES_A_RANK = 350
_PAGE = 4096


def estimate(config: Config, plan: Plan) -> Budget:
    """The parts of `plan`."""
    itemsize = plan.dtype.itemsize
    hidden, vocab = config.hidden_size, config.vocab_size
    vision = encoding = 0
    if plan.vision != "elsewhere":
        tower = "openvino" if plan.openvino else plan.device
        vision = session_bytes(config.visual, plan.vit, tower)
        encoding = workspace_bytes(config.visual, plan.vit, plan.images, tower)
    if plan.embeddings == "device":
        table = vocab * hidden * itemsize
    else:  # rows are read from the mapped file; on CUDA they are not in its memory at all
        table = min(plan.context, vocab) * (ceil(2 * hidden / _PAGE) + 1) * _PAGE if plan.device == "cpu" else 0
    kv_cache = plan.slots * plan.context * position_bytes(config, plan)
    if plan.device == "cuda" and plan.vision == "resident":  # onnxruntime's arena keeps it (vision/encoder.py)
        vision, encoding = vision + encoding, 0
    if plan.vision == "released":  # the tower and the cache are never in memory together
        encoding, vision = encoding + vision - kv_cache, 0
    return Budget(
        layers=_layers_bytes(config, plan),
        embeddings=table,
        head=_matrix_bytes(vocab, hidden, 8 if plan.head == "int8" else None, hidden, plan),
        vision=vision,
        kv_cache=kv_cache,
        # layers are packed before there are a tower and a cache
        workspace=max(encoding, _prefill_bytes(config, plan), _packing_bytes(config, plan) - vision - kv_cache),
        runtime=_RUNTIME[plan.device] + (_BYTES_A_RANK * vocab if plan.device == "cpu" else 0),
    )


def position_bytes(config: Config, plan: Plan) -> int:
    """Keys and values of one position."""
    if plan.kv_cache == "int8":
        return 2 * config.num_hidden_layers * (config.hidden_size + 2 * config.num_attention_heads)
    return 2 * config.num_hidden_layers * config.hidden_size * plan.dtype.itemsize


def _layers_bytes(config: Config, plan: Plan) -> int:
    quant = config.quantization
    bits = 4 if quant is not None and quant.bits == 4 else None  # 8 bits are dequantized at load
    group = 0 if quant is None else quant.group_size
    block = sum(
        _matrix_bytes(n, k, bits, k if group == -1 else group, plan, quant is not None and quant.sym)
        for n, k in projections(config).values()
    )
    vectors = (3 * config.hidden_size + 2 * config.hidden_size) * plan.dtype.itemsize  # c_attn's bias, two norms
    return config.num_hidden_layers * (block + vectors) + config.hidden_size * plan.dtype.itemsize


def _matrix_bytes(outputs: int, inputs: int, bits: int | None, group: int, plan: Plan, symmetric: bool = False) -> int:
    """One matrix product's weight as the backend of the device keeps it (kernels/cpu.py, kernels/gpu/weight.py)."""
    if bits is None:
        return outputs * inputs * plan.dtype.itemsize
    groups = ceil(inputs / group)
    if plan.device == "cpu":
        padded = padded_group(group)
        if bits == 8 and plan.activations == "int8":
            return outputs * (padded + 4 * (padded // block_size(padded)))
        channels = bits // 4 * groups * padded
        blocks = channels // block_size(padded)
        return outputs * (channels // 2 + 4 * blocks + (0 if symmetric else ceil(blocks / 2)))
    scales = 4 if bits == 8 else 2
    return ceil(outputs / TILE) * TILE * (ceil(inputs / CHUNK) * CHUNK * bits // 8 + scales * groups)


def _prefill_bytes(config: Config, plan: Plan) -> int:
    """One layer's activations for a chunk of a prompt, and the logits of its last position."""
    rows = min(plan.context, PREFILLED)
    hidden, inner, size = config.hidden_size, config.ffn_size, plan.dtype.itemsize
    logits = 6 * 4 * config.vocab_size * plan.slots  # sorted, their indices, chances, noise
    logits += 13 * config.vocab_size * plan.slots  # Samplers: seen, counts, noise, bias
    if plan.device == "cuda":
        kinds = 2 * len(counts_of(plan.slots)) * len(buckets_of(plan.context))  # greedy and as the model samples
        logits += min(kinds, MAX_GRAPHS) * GRAPH_BYTES
    attention = 0
    if plan.kv_cache == "int8" and plan.device == "cpu":  # a few heads' keys and values in float32, and their mask
        attention = 2 * 4 * max(FLOATS_AT_ONCE, 2 * plan.context * config.kv_channels) + rows * plan.context
    if plan.device == "cpu":
        # residual, normed, qkv and its rotated copies, attended; w1, w2 and their product
        return logits + max(rows * hidden * 10 * size + attention, rows * (2 * hidden + 4 * inner) * size)
    if plan.turing:  # the largest weight in float16, its product in both dtypes, one sequence's keys, values and mask
        attention = 4 * inner * hidden + 12 * rows * inner + 4 * plan.context * hidden + rows * plan.context
    # residual in float32, embeddings, normed rows, qkv, attended; the MLP's product
    return logits + rows * (4 * hidden + (6 * hidden + inner) * size) + attention


def _packing_bytes(config: Config, plan: Plan) -> int:
    """The largest projection while it is packed, beside what it is packed into.

    4 bits: its words as they are on disk (w1 and w2 as one on CUDA), with desc_act sorted too, and on a CPU in rows of
    outputs; on CUDA 3 bytes a level of 1,024 outputs. 8 bits are dequantized: 10 bytes a level.
    """
    quant, sizes = config.quantization, projections(config)
    if quant is None:
        return config.vocab_size * config.hidden_size * 2 if plan.device == "cpu" else 0
    largest, inputs = max((n * k, k) for n, k in sizes.values())
    if quant.bits == 8:
        return 10 * largest
    if plan.device == "cpu":  # and three copies of the scales or zeros
        return largest // 2 * (2 + quant.desc_act) + 8 * largest // block_size(
            padded_group(inputs if quant.group_size == -1 else quant.group_size)
        )
    largest = max(largest, 2 * config.ffn_size * config.hidden_size)
    return largest // 2 * (1 + quant.desc_act) + 3 * 1024 * max(k for _, k in sizes.values())


def longest_context(config: Config, plan: Plan, memory: int) -> int:
    """The largest context, a multiple of 64 or the model's own, whose estimate fits into `memory` bytes; 0 if none."""
    most = config.max_position_embeddings
    contexts = range(64, most + 64, 64)  # the last one may be more than the model's
    fitting = bisect_right(
        contexts, memory, key=lambda context: estimate(config, replace(plan, context=min(context, most))).total
    )
    return min(contexts[fitting - 1], most) if fitting else 0


def remedies(config: Config, plan: Plan, memory: int) -> Iterator[str]:
    """Flags that would each make `plan` fit into `memory` bytes, the least costly first."""

    def fits(**changes: object) -> bool:
        return estimate(config, replace(plan, **changes)).total <= memory  # type: ignore[arg-type]

    shorter = longest_context(config, plan, memory)
    if MIN_CONTEXT <= shorter < plan.context:
        yield f"--max-context {shorter}"
    if plan.vision == "resident":
        if fits(vision="released"):
            yield "--release-vision"
        if plan.device == "cuda" and fits(vision="elsewhere"):
            yield "--vision-device cpu"
    if plan.openvino and fits(openvino=False):
        yield "--vision-device cpu"
    for part in ("kv_cache", "head"):
        if getattr(plan, part) != "int8" and fits(**{part: "int8"}):
            yield f"--{part.replace('_', '-')} int8"
    for name, profile in PROFILES.items():
        if name != "12g" and plan.vit != profile.vit and fits(**vars(profile)):
            yield f"--profile {name} (its vision tower: python -m export.vit CHECKPOINT BUNDLE --dtype {profile.vit})"


def choose(
    config: Config,
    plan: Plan,
    *,
    profile: str,
    memory: int,
    where: str,
    vit: str | None = None,
    head: Head | None = None,
    kv_cache: KVType | None = None,
    context: int | None = None,
) -> tuple[str, Plan]:
    """The profile's name and the plan to run.

    plan: what no profile decides. profile: one of PROFILES, or "auto": the first of them that leaves 2,048 positions
    (`context`, where it is given), else the first that leaves 512. vit: dtype of the tower that there is; None where it
    will be made. head, kv_cache: by hand, whatever the profile says. context None: as many positions as fit.
    memory: bytes that may be used. ConfigError if `vit` is not the profile's; FitError if nothing fits.
    """
    if profile != "auto" and profile not in PROFILES:
        raise ConfigError(f"profile is {profile!r}, known are 'auto', {', '.join(map(repr, PROFILES))}")
    if profile != "auto" and vit is not None and vit not in towers(profile):
        raise ConfigError(
            f"profile {profile} takes a vision tower in {' or '.join(towers(profile))}, and the bundle's is in {vit}; "
            f"choose another profile, or make one with:\n  python -m export.vit CHECKPOINT BUNDLE --dtype "
            f"{PROFILES[profile].vit}"
        )

    def planned(name: str, positions: int | None) -> Plan:
        asked = by_profile(plan, name)
        found = replace(
            asked, vit=vit or asked.vit, head=head or asked.head, kv_cache=kv_cache or asked.kv_cache, context=1
        )
        if found.head != "int8" and (config.quantization is None or config.quantization.bits != 4):
            found = replace(found, activations="float")  # no product is packed
        return replace(found, context=positions or longest_context(config, found, memory))

    names = (profile,) if profile != "auto" else tuple(PROFILES)
    for least in (PREFERRED_CONTEXT, MIN_CONTEXT):
        for name in names:
            found = planned(name, context)
            enough = context is not None or found.context >= min(least, config.max_position_embeddings)
            if enough and estimate(config, found).total <= memory:
                return name, found
    tried = planned(names[0], context or min(MIN_CONTEXT, config.max_position_embeddings))
    raise does_not_fit(config, tried, memory, where)


def by_profile(plan: Plan, name: str) -> Plan:
    """`plan` with the profile's choices; in float32 the exact profile keeps the tower in float32 too."""
    exact = name == "12g" and plan.dtype == torch.float32
    return replace(plan, **vars(PROFILES[name]) | ({"vit": "float32"} if exact else {}))


def towers(profile: str) -> tuple[str, ...]:
    """Dtypes of the vision tower that a profile allows."""
    return ("float16", "float32") if profile == "12g" else (PROFILES[profile].vit,)


def does_not_fit(config: Config, plan: Plan, memory: int, where: str) -> FitError:
    """The error for a `plan` that takes more than the `memory` bytes of `where`: both numbers and what would help."""
    budget = estimate(config, plan)
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.2f}" for name, size in vars(budget).items() if size)
    found = list(remedies(config, plan, memory))
    helps = "It fits with " + ", or with ".join(found) if found else "No profile makes it fit"
    return FitError(
        f"{plan.context} positions need {budget.total / 1e9:.2f} GB and {where} has {memory / 1e9:.2f} "
        f"GB free ({parts}). {helps}"
    )
