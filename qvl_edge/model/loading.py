"""Checkpoint tensors into modules: strict about names and shapes, with one extra tensor in memory at a time."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels import Int4Weight, Int8Weight, TritonWeight, dequantize_gptq, pack_for_triton, quantize_int8
from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.config import Config
from qvl_edge.errors import CheckpointError, ConfigError
from qvl_edge.memory import trim_heap
from qvl_edge.model.decoder import QWenLMHeadModel
from qvl_edge.model.fused import FusedDecoder, Int4Projection, fuse_block
from qvl_edge.model.linear import Int4Linear, Int8Linear, packed
from qvl_edge.model.vit import VisionTransformer
from qvl_edge.options import Activations, Embeddings, Head
from qvl_edge.shards import ZERO3

QUANTIZED = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")  # of every block, in the order they run
GPTQ_WEIGHT = ("qweight", "qzeros", "scales", "g_idx")
GPTQ_TENSORS = (*GPTQ_WEIGHT, "bias")
OnBytes = Callable[[int], None]
"""Called with the bytes of each tensor that was read."""
_TRIMMED_AFTER = 200_000_000  # bytes that are read
_WTE, _HEAD = "transformer.wte.weight", "lm_head.weight"
_INTEGERS = (".qweight", ".qzeros", ".g_idx")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_IGNORED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")  # buffers that some fine-tuning tools save along


def expected_tensors(config: Config, *, decoder: bool = True, visual: bool = True) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config holds."""
    shapes: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        if visual:
            for name, tensor in VisionTransformer(config.visual).state_dict().items():
                shapes[VISUAL + name] = tuple(tensor.shape)
        if decoder:
            for name, tensor in QWenLMHeadModel(config).state_dict().items():
                shapes[name] = tuple(tensor.shape)
            for index in range(config.num_hidden_layers):
                for layer in QUANTIZED if config.quantization else ():
                    name = f"transformer.h.{index}.{layer}"
                    for tensor_name in (f"{name}.weight", f"{name}.bias"):
                        shapes.pop(tensor_name, None)
                    shapes |= {f"{name}.{part}": shape for part, shape in gptq_shapes(config, layer).items()}
    return shapes


def has_bias(config: Config, layer: str) -> bool:
    """Whether a projection, e.g. layer = "mlp.w1", has a bias in the float model (modeling_qwen.py)."""
    return layer == "attn.c_attn" or not config.no_bias


def projections(config: Config) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of a block's projections, by their names in it."""
    hidden, inner = config.hidden_size, config.ffn_size
    sizes = ((3 * hidden, hidden), (hidden, hidden), (inner, hidden), (inner, hidden), (hidden, inner))
    return dict(zip(QUANTIZED, sizes, strict=True))


def gptq_shapes(config: Config, layer: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the disk tensors of one quantized projection, e.g. layer = "mlp.w1"."""
    quant = config.quantization
    assert quant is not None
    n_out, n_in = projections(config)[layer]
    groups = quant.groups(n_in)
    return {
        "qweight": (n_in * quant.bits // 32, n_out),
        "qzeros": (groups, n_out * quant.bits // 32),
        "scales": (groups, n_out),
        "g_idx": (n_in,),
        "bias": (n_out,),
    }


def check_tensors(checkpoint: Checkpoint, *, decoder: bool = True, visual: bool = True) -> None:
    """CheckpointError if tensors are missing, left over, or of shapes that contradict config.json."""
    config = checkpoint.config
    expected = expected_tensors(config, decoder=decoder, visual=visual)
    # AutoGPTQ before 0.5 writes a bias of zeros for a layer that has none, later versions and GPTQModel write none
    unbiased = tuple(f".{layer}.bias" for layer in QUANTIZED if config.quantization and not has_bias(config, layer))
    wanted = {n for n in checkpoint.names if (visual if n.startswith(VISUAL) else decoder)}
    found = {name for name in wanted if not name.endswith(_IGNORED) or name in expected}
    missing = {name for name in set(expected) - found if not name.endswith(unbiased)}
    unknown = found - set(expected)
    problems = [
        f"{what} tensors, such as {sorted(names)[0]}"
        for what, names in ((f"lacks {len(missing)}", missing), (f"has {len(unknown)} unknown", unknown))
        if names
    ]
    shapes = {name: checkpoint.shape(name) for name in sorted(found & set(expected))}
    wrong = [name for name, shape in shapes.items() if shape != expected[name]]
    other = [name for name in shapes if not name.endswith(_INTEGERS) and checkpoint[name].dtype not in _FLOATS]
    if other:  # booleans would be taken for zeros and ones
        problems.append(f"{other[0]} is {checkpoint[other[0]].dtype}, expected a float of 16, 32 or 64 bits")
    if wrong:
        problems.append(f"{wrong[0]} has shape {shapes[wrong[0]]}, config.json asks for {expected[wrong[0]]}")
    if any(".lora_" in name or ".base_layer." in name for name in unknown):
        remedy = "It was saved with an adapter in it: merge that with PEFT (merge_and_unload), and save the model again"
    elif any(shapes[name] == (0,) for name in wrong):
        remedy = ZERO3
    elif config.quantization and not any(name.endswith(".qweight") for name in found):
        remedy = (
            "Its settings say that it is quantized, and its weights are float: remove quantize_config.json, and "
            "quantization_config from config.json"
        )
    elif any(name.endswith(".qweight") for name in unknown):
        remedy = "Its weights are quantized, and no quantize_config.json says how: copy it from where they came"
    else:
        remedy = "Is its config.json that of these weights, and is the copy complete?"
    if problems:
        raise CheckpointError(f"{checkpoint.path} {'; '.join(problems)}. {remedy}")


class _Reader:
    """Reads tensors to a device and releases their mapped pages."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str, on_bytes: OnBytes | None
    ):
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self._on_bytes = on_bytes or (lambda _: None)
        self._untrimmed = 0

    def __call__(self, name: str) -> Tensor:
        """The tensor in `dtype`, always a copy: a mapped one would be read from the disk while the model runs."""
        tensor = self.checkpoint[name]
        copy = tensor.to(device=self.device, dtype=self.dtype, copy=True).contiguous()
        self.done(name)
        return copy

    def int4(self, name: str) -> Int4Projection:
        """A projection with 4 bits; call `done_gptq` when it has been packed. CheckpointError if it is damaged."""
        parts = (self.checkpoint[f"{name}.{part}"].to(self.device) for part in GPTQ_WEIGHT)
        quant = self.checkpoint.config.quantization
        assert quant is not None
        try:
            weight = Int4Weight.from_gptq(
                *parts, group_size=quant.group_size, checkpoint_format=quant.checkpoint_format, name=name
            )
        except ValueError as error:
            raise CheckpointError(f"{self.checkpoint.path}: {error}") from None
        return weight, self.bias(name)

    def bias(self, name: str) -> Tensor | None:
        """Of a quantized projection: None if it is absent or zero, which adding would only cost time."""
        if f"{name}.bias" not in self.checkpoint:
            return None
        bias = self.checkpoint[f"{name}.bias"]
        return bias.to(self.device, self.dtype, copy=True) if bool(bias.any()) else None

    def done_gptq(self, name: str) -> None:
        for part in GPTQ_TENSORS:
            if f"{name}.{part}" in self.checkpoint:
                self.done(f"{name}.{part}")

    def head(self, head: Head) -> Tensor | Int8Weight:
        """lm_head, quantized from the mapped file row by row if it is to be int8."""
        if head == "float16":
            return self(_HEAD)
        if head != "int8":
            raise ConfigError(f"head is {head!r}, known are 'float16' (as the model's dtype) and 'int8'")
        try:
            weight = quantize_int8(self.checkpoint[_HEAD])
        except ValueError as error:
            raise CheckpointError(
                f"{self.checkpoint.path}: {_HEAD}, {error}: it is damaged, or its training diverged; copy it again, or "
                "take an earlier one"
            ) from None
        self.done(_HEAD)
        return Int8Weight(weight.levels.to(self.device), weight.scales.to(self.device))

    def embeddings(self, where: Embeddings) -> Tensor:
        """The embedding table: the mapped file itself for "host", so that only rows that are looked up take memory."""
        if where == "device":
            return self(_WTE)
        if where != "host":
            raise ConfigError(f"embeddings is {where!r}, known are 'host' and 'device'")
        return self.checkpoint[_WTE]

    def done(self, name: str) -> None:
        """Count a tensor that was read, and release its pages."""
        size = self.checkpoint.nbytes(name)
        self._on_bytes(size)
        self.checkpoint.release(name)
        self._untrimmed += size
        if self._untrimmed > _TRIMMED_AFTER:
            self._untrimmed = 0
            trim_heap()


def load_decoder(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    head: Head = "float16",
    embeddings: Embeddings = "device",
    activations: Activations = "float",
    on_bytes: OnBytes | None = None,
) -> QWenLMHeadModel:
    """The decoder with its weights in `dtype` (int4 layers stay int4), ready to run. activations: of the CPU's."""
    check_tensors(checkpoint, visual=False)
    read = _Reader(checkpoint, dtype, device, on_bytes)
    with torch.device("meta"):
        model = QWenLMHeadModel(checkpoint.config)
    lm_head = read.head(head)  # first, as quantizing it takes more than it keeps
    if isinstance(lm_head, Int8Weight):
        model.lm_head = Int8Linear(lm_head, activations)
    else:
        _set(model.lm_head, "weight", lm_head)
    del lm_head  # 0.6 GB of levels that have been packed
    _set(model.transformer.wte, "weight", read.embeddings(embeddings))
    outer = (model.lm_head, model.transformer.wte)
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            weight, module.bias = read.int4(name)
            module.weight = packed(weight, activations)
            del weight  # before its pages are released
            read.done_gptq(name)
            continue
        if module in outer:
            continue
        if f"{name}.qweight" in checkpoint:  # GPTQ with 8 bits
            _set(module, "weight", read_projection(checkpoint, name).to(device=device, dtype=dtype))
            _set(module, "bias", read.bias(name))
            read.done_gptq(name)
            continue
        for parameter in [key for key, _ in module.named_parameters(recurse=False)]:
            _set(module, parameter, read(f"{name}.{parameter}"))
    return model.eval()


def load_fused(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    head: Head = "float16",
    embeddings: Embeddings = "device",
    on_bytes: OnBytes | None = None,
    backend: str = "triton",
) -> FusedDecoder:
    """The int4 decoder for the GPU's kernels, one tensor after another in their order on `device`.

    ConfigError if the checkpoint is not GPTQ with 4 bits, or `dtype` is not one that the kernels compute in.
    """
    check_tensors(checkpoint, visual=False)
    quant = checkpoint.config.quantization
    if quant is None or quant.bits != 4:
        raise ConfigError(
            f"{checkpoint.path} is not GPTQ with 4 bits; make it so with:\n"
            f"  python -m quantize.gptq {checkpoint.path} BUNDLE --calibration conversations.json"
        )
    read = _Reader(checkpoint, dtype, device, on_bytes)
    lm_head: Tensor | Int8Weight | TritonWeight = read.head(head)  # first, as above
    if isinstance(lm_head, Int8Weight):
        lm_head = pack_for_triton(lm_head)
    blocks = []
    for index in range(checkpoint.config.num_hidden_layers):
        block = f"transformer.h.{index}"
        blocks.append(fuse_block(block, read, read.int4))
        for layer in QUANTIZED:
            read.done_gptq(f"{block}.{layer}")
    return FusedDecoder(
        checkpoint.config,
        wte=read.embeddings(embeddings),
        blocks=blocks,
        ln_f=read("transformer.ln_f.weight"),
        lm_head=lm_head,
        backend=backend,
    )


def load_visual(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> VisionTransformer:
    """The vision tower with its weights in `dtype`."""
    check_tensors(checkpoint, decoder=False)
    read = _Reader(checkpoint, dtype, device, None)
    with torch.device("meta"):
        visual = VisionTransformer(checkpoint.config.visual)
    for name, module in visual.named_modules():
        for parameter in [key for key, _ in module.named_parameters(recurse=False)]:
            _set(module, parameter, read(VISUAL + (f"{name}.{parameter}" if name else parameter)))
    return visual.eval()


def read_projection(checkpoint: Checkpoint, name: str) -> Tensor:
    """The weight (N, K) float32 of a quantized projection, e.g. name = "transformer.h.0.mlp.w1"."""
    quant = checkpoint.config.quantization
    assert quant is not None
    parts = [checkpoint[f"{name}.{part}"] for part in GPTQ_WEIGHT]
    return dequantize_gptq(
        *parts, bits=quant.bits, group_size=quant.group_size, checkpoint_format=quant.checkpoint_format, name=name
    )


def _set(module: nn.Module, parameter: str, tensor: Tensor | None) -> None:
    setattr(module, parameter, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
