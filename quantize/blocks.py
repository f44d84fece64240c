"""One decoder block: collect Hessians in the order its projections run, quantize them, run the quantized block."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import rotate
from quantize.grid import Quantized, round_weight
from quantize.solver import FULL, Hessian, Method, output_energy, quantize_weight, relative_error
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config, QuantConfig
from qvl_edge.errors import CalibrationError, CheckpointError
from qvl_edge.model.decoder import Attend, QWenBlock, logn_scale, ntk_alpha, rotary_tables
from qvl_edge.model.loading import QUANTIZED
from qvl_edge.model.streaming import load_part

STAGES = (("attn.c_attn",), ("attn.c_proj",), ("mlp.w1", "mlp.w2"), ("mlp.c_proj",))
"""Projections that share an input form a stage; with true_sequential a stage sees the earlier ones quantized."""
_NORMS = {"attn.c_attn": "ln_1", "mlp.w1": "ln_2"}  # stages whose input is a norm's output

Tick = Callable[[float, str], None]
"""tick(share, text): the share of the block that is done (0 … 1), and what is running."""


@dataclass(frozen=True)
class LayerReport:
    """What quantizing one projection cost. Errors are relative squared ones.

    error: |(W - Q) X|² / |W X|² over the calibration inputs X as they arrive (from earlier layers already quantized);
    with --round-to-nearest, which has no inputs, |W - Q|² / |W|².
    """

    name: str  # transformer.h.0.attn.c_attn
    in_features: int
    out_features: int
    error: float
    round_to_nearest_error: float  # the same for what --round-to-nearest would write
    damp_percent: float | None = None  # above the setting where the Hessian needed more; None without a Hessian
    dead_channels: int = 0  # inputs that were 0 in every sample


@dataclass(frozen=True)
class Streams:
    """The float model's residual stream (T, hidden) on each sample: before a block, inside, after it."""

    before: Sequence[Tensor]
    middle: Sequence[Tensor]  # after the attention, before the MLP
    after: Sequence[Tensor]


class _Stop(Exception):
    """Ends a forward pass once the last wanted input has been seen."""


def causal_attention(config: Config, length: int, device: torch.device | str) -> Attend:
    """The attention of a prefill of `length` tokens, without a cache: NTK alpha and log-n as at run time."""
    positions = torch.arange(length, device=device)[None]
    alpha = ntk_alpha(length, config.seq_length) if config.use_dynamic_ntk else 1.0
    cos, sin = rotary_tables(config, positions, torch.full((1,), alpha, device=device))
    q_scale = logn_scale(config, positions)[:, :, None, None] if config.use_logn_attn else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q = q if q_scale is None else q * q_scale
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return out.transpose(1, 2)

    return attend


def block_name(index: int) -> str:
    """Prefix of a block's tensors in the checkpoint."""
    return f"transformer.h.{index}"


def projection(block: QWenBlock, layer: str) -> nn.Linear:
    """The projection `layer` ("attn.c_attn") of a float block."""
    module = block.get_submodule(layer)
    assert isinstance(module, nn.Linear)
    return module


def load_block(checkpoint: Checkpoint, index: int, device: torch.device | str) -> QWenBlock:
    """Block `index` of a float checkpoint in float32. Biases of projections are rounded to float16 as on disk."""
    with torch.device("meta"):
        block = QWenBlock(checkpoint.config)
    load_part(block, checkpoint, f"{block_name(index)}.", device)
    for layer in QUANTIZED:
        bias = projection(block, layer).bias
        if bias is not None:
            bias.copy_(bias.half())
            if not bool(torch.isfinite(bias).all()):
                name = f"{block_name(index)}.{layer}.bias"
                raise CheckpointError(f"{name} has values beyond 65504, the largest of float16, the dtype on disk")
    return block.eval()


def _run(block: QWenBlock, config: Config, sample: Tensor, device: torch.device | str) -> Tensor:
    """The block's output (T, hidden) on one sample, on `device`; its input if a hook raised _Stop."""
    x = sample.to(device)[None]
    try:
        return block(x, causal_attention(config, len(sample), device))[0]
    except _Stop:
        return x[0]


def _missing(block: QWenBlock, layer: str, streams: Streams, number: int, x: Tensor) -> Tensor:
    """The float model's values minus this one's on a sample: of the input x (T, K) behind a norm, else of the output
    (T, N) on x."""
    before, middle = (stream[number].to(x) for stream in (streams.before, streams.middle))
    if layer in _NORMS:
        return block.get_submodule(_NORMS[layer])(before if layer == "attn.c_attn" else middle) - x
    module = projection(block, layer)
    exact = middle - before if layer == "attn.c_proj" else streams.after[number].to(x) - middle
    return exact - F.linear(x, module.weight, module.bias)


def collect_moments(
    block: QWenBlock,
    config: Config,
    inputs: Sequence[Tensor],
    streams: Streams | None,
    stages: tuple[tuple[str, ...], ...],
    device: torch.device | str,
    tick: Tick,
) -> dict[str, tuple[Hessian, Tensor | None]]:
    """The Hessian of each stage's input x, by the stage's first projection, and with `streams` the sum of d x.T, d
    being what `_missing` returns. The forward pass ends at the last stage's input.
    """
    found: dict[str, tuple[Hessian, Tensor | None]] = {}
    number, hooks = 0, []

    def watch(layer: str, *, last: bool) -> None:
        module = projection(block, layer)
        hessian, drift = Hessian(module.in_features, device=device), None
        if streams is not None:
            rows = module.in_features if layer in _NORMS else module.out_features
            drift = torch.zeros(rows, module.in_features, dtype=torch.float32, device=device)
        found[layer] = hessian, drift

        def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0][0]
            hessian.add(x)
            if streams is not None and drift is not None:
                drift.addmm_(_missing(block, layer, streams, number, x).T, x)
            if last:
                raise _Stop

        hooks.append(module.register_forward_pre_hook(look))

    for stage in stages:
        watch(stage[0], last=stage is stages[-1])
    try:
        what = f"inputs of {stages[-1][0] if len(stages) == 1 else 'all projections'}"
        for number, sample in enumerate(inputs):  # noqa: B007 (the hooks read it)
            _run(block, config, sample, device)
            tick((number + 1) / len(inputs), what)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def quantize_block(
    block: QWenBlock,
    config: Config,
    index: int,
    inputs: Sequence[Tensor],
    quant: QuantConfig,
    device: torch.device | str,
    tick: Tick,
    *,
    streams: Streams | None = None,
    method: Method = FULL,
) -> tuple[dict[str, Quantized], list[LayerReport]]:
    """GPTQ on the five projections of block `index`, whose weights become the quantized ones in place.

    inputs: (T, hidden) float32 per sample. streams: the float model's, whose activations the projections are solved
    for. Returns the projections by name ("attn.c_attn") and what each cost.
    """
    quantized: dict[str, Quantized] = {}
    reports: list[LayerReport] = []
    parts = len(STAGES) + 1.0  # the last part is the run of the finished block
    moments: dict[str, tuple[Hessian, Tensor | None]] = {}
    if not quant.true_sequential:
        moments = collect_moments(block, config, inputs, streams, STAGES, device, lambda f, t: tick(f / parts, t))
    for number, stage in enumerate(STAGES):
        if quant.true_sequential:

            def within(share: float, text: str, number: int = number) -> None:
                tick((number + share / 2) / parts, text)

            moments = collect_moments(block, config, inputs, streams, (stage,), device, within)
        collected, drift = moments.pop(stage[0])
        hessian = collected.matrix()
        if drift is not None:
            drift *= 2 * method.follow / collected.rows
        for layer in stage:
            name = f"{block_name(index)}.{layer}"
            module = projection(block, layer)
            weight = module.weight
            owed = weight @ drift if drift is not None and stage[0] in _NORMS else drift
            result = quantized[layer] = quantize_weight(weight, hessian, quant, drift=owed, method=method, name=name)
            del owed
            whole = output_energy(weight, hessian)
            rounded = round_weight(weight, quant, name=name).weight()
            rounding_error = relative_error(weight, rounded, hessian, whole=whole)
            del rounded  # before the next one of this size
            module.weight = nn.Parameter(result.weight(), requires_grad=False)
            reports.append(
                LayerReport(
                    name=name,
                    in_features=weight.shape[1],
                    out_features=weight.shape[0],
                    error=relative_error(weight, module.weight, hessian, whole=whole),
                    round_to_nearest_error=rounding_error,
                    damp_percent=result.damp_percent,
                    dead_channels=result.dead_channels,
                )
            )
            tick((number + 1) / parts, layer)
    return quantized, reports


def round_block(
    block: QWenBlock, index: int, quant: QuantConfig, tick: Tick
) -> tuple[dict[str, Quantized], list[LayerReport]]:
    """Round to nearest instead: no inputs, so the reported errors are those of the weights."""
    quantized: dict[str, Quantized] = {}
    reports: list[LayerReport] = []
    for number, layer in enumerate(QUANTIZED):
        name = f"{block_name(index)}.{layer}"
        weight = projection(block, layer).weight
        quantized[layer] = round_weight(weight, quant, name=name)
        error = relative_error(weight, quantized[layer].weight(), None)
        reports.append(LayerReport(name, weight.shape[1], weight.shape[0], error, error))
        tick((number + 1) / len(QUANTIZED), layer)
    return quantized, reports


def run_block(
    block: QWenBlock, config: Config, index: int, inputs: Sequence[Tensor], device: torch.device | str, tick: Tick
) -> Iterator[Tensor]:
    """The block's output (T, hidden) float32 on each of `inputs`, on the CPU: what enters the next block.

    CalibrationError names the block if a value is not finite.
    """
    for number, sample in enumerate(inputs, 1):
        output = _run(block, config, sample, device)
        _check_output(output, index, number)
        tick((len(STAGES) + number / len(inputs)) / (len(STAGES) + 1), "running the quantized block")
        yield output.cpu()


def run_float(
    block: QWenBlock, config: Config, index: int, inputs: Sequence[Tensor], device: torch.device | str, tick: Tick
) -> Iterator[tuple[Tensor, Tensor]]:
    """As run_block, the float model's residual stream after the block's attention and after the block."""
    middle: list[Tensor] = []
    hook = block.ln_2.register_forward_pre_hook(lambda module, arguments: middle.append(arguments[0][0]))
    try:
        for number, sample in enumerate(inputs, 1):
            output = _run(block, config, sample, device)
            _check_output(output, index, number)
            tick(number / len(inputs), "running the float block")
            yield middle.pop().cpu(), output.cpu()
    finally:
        hook.remove()


def _check_output(output: Tensor, index: int, number: int) -> None:
    if not bool(torch.isfinite(output).all()):
        raise CalibrationError(f"{block_name(index)} gives NaN or infinity on calibration sample {number}")


def block_tensors(
    block: QWenBlock, checkpoint: Checkpoint, index: int, quantized: dict[str, Quantized], quant: QuantConfig
) -> dict[str, Tensor]:
    """A block's tensors as written: norms as in the source; a bias for every projection, as in auto-gptq's files."""
    prefix = block_name(index)
    tensors = {f"{prefix}.{norm}.weight": checkpoint[f"{prefix}.{norm}.weight"] for norm in ("ln_1", "ln_2")}
    for layer, result in quantized.items():
        module = projection(block, layer)
        bias = module.bias if module.bias is not None else torch.zeros(module.out_features)
        packed = result.packed(quant) | {"bias": bias.half().cpu()}
        tensors |= {f"{prefix}.{layer}.{part}": tensor for part, tensor in packed.items()}
    return tensors
