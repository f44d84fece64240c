"""Checkpoint tensors into modules: strict about names and shapes, one tensor in memory beyond what stays."""

import torch
from torch import Tensor, nn

from kernels import dequantize_gptq
from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.config import Config
from qvl_edge.errors import CheckpointError, ConfigError
from qvl_edge.model.decoder import QWenLMHeadModel
from qvl_edge.model.fused import FusedDecoder, Head, fuse_block
from qvl_edge.model.linear import Int4Linear, read_gptq
from qvl_edge.model.vit import VisionTransformer

QUANTIZED = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")  # of every block, in the order they run
GPTQ_TENSORS = ("qweight", "qzeros", "scales", "g_idx", "bias")
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


def gptq_shapes(config: Config, layer: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the disk tensors of one quantized projection, e.g. layer = "mlp.w1"."""
    quant = config.quantization
    assert quant is not None
    n_in = config.ffn_size if layer == "mlp.c_proj" else config.hidden_size
    n_out = {"attn.c_attn": 3 * config.hidden_size, "mlp.w1": config.ffn_size, "mlp.w2": config.ffn_size}.get(
        layer, config.hidden_size
    )
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
    expected = expected_tensors(checkpoint.config, decoder=decoder, visual=visual)
    wanted = {n for n in checkpoint.names if (visual if n.startswith(VISUAL) else decoder)}
    found = {name for name in wanted if not name.endswith(_IGNORED) or name in expected}
    problems = [
        f"{what} {len(names)} tensors, such as {sorted(names)[0]}"
        for what, names in (("lacks", set(expected) - found), ("has unknown", found - set(expected)))
        if names
    ]
    for name in sorted(found & set(expected)):
        if (shape := checkpoint.shape(name)) != expected[name]:
            problems.append(f"{name} has shape {shape}, config.json asks for {expected[name]}")
            break
    if problems:
        raise CheckpointError(
            f"{checkpoint.path} " + "; ".join(problems) + ". Is its config.json that of these weights, and is the copy "
            "complete?"
        )


def load_decoder(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> QWenLMHeadModel:
    """The decoder with its weights in `dtype` (int4 layers stay int4), ready to run."""
    check_tensors(checkpoint, visual=False)
    with torch.device("meta"):
        model = QWenLMHeadModel(checkpoint.config)
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            tensors = {part: checkpoint[f"{name}.{part}"].to(device) for part in GPTQ_TENSORS}
            module.load_gptq(tensors, name=name, dtype=dtype)
            continue
        for parameter in [key for key, _ in module.named_parameters(recurse=False)]:
            full = f"{name}.{parameter}"
            if parameter == "weight" and f"{name}.qweight" in checkpoint:
                tensor = read_projection(checkpoint, name)  # GPTQ with 8 bits
            else:
                tensor = checkpoint[full]
            _set(module, parameter, tensor.to(device=device, dtype=dtype))
    return model.eval()


def load_fused(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    head: Head = "float16",
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

    def read(name: str) -> Tensor:
        # cloned: a memory-mapped tensor that needed no conversion would read from disk while running
        return checkpoint[name].to(device=device, dtype=dtype).contiguous().clone()

    blocks = []
    for index in range(checkpoint.config.num_hidden_layers):
        block = f"transformer.h.{index}"
        layers = {}
        for layer in QUANTIZED:
            tensors = {part: checkpoint[f"{block}.{layer}.{part}"].to(device) for part in GPTQ_TENSORS}
            layers[layer] = read_gptq(
                tensors,
                name=f"{block}.{layer}",
                dtype=dtype,
                group_size=quant.group_size,
                checkpoint_format=quant.checkpoint_format,
            )
        blocks.append(fuse_block(read(f"{block}.ln_1.weight"), read(f"{block}.ln_2.weight"), layers))
    return FusedDecoder(
        checkpoint.config,
        wte=read("transformer.wte.weight"),
        blocks=blocks,
        ln_f=read("transformer.ln_f.weight"),
        lm_head=read("lm_head.weight"),
        head=head,
        backend=backend,
    )


def load_visual(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> VisionTransformer:
    """The vision tower with its weights in `dtype`."""
    check_tensors(checkpoint, decoder=False)
    with torch.device("meta"):
        visual = VisionTransformer(checkpoint.config.visual)
    for name, module in visual.named_modules():
        for parameter in [key for key, _ in module.named_parameters(recurse=False)]:
            full = VISUAL + (f"{name}.{parameter}" if name else parameter)
            _set(module, parameter, checkpoint[full].to(device=device, dtype=dtype))
    return visual.eval()


def read_projection(checkpoint: Checkpoint, name: str) -> Tensor:
    """The weight (N, K) float32 of a quantized projection, e.g. name = "transformer.h.0.mlp.w1"."""
    quant = checkpoint.config.quantization
    assert quant is not None
    parts = [checkpoint[f"{name}.{part}"] for part in GPTQ_TENSORS[:4]]
    return dequantize_gptq(
        *parts, bits=quant.bits, group_size=quant.group_size, checkpoint_format=quant.checkpoint_format, name=name
    )


def _set(module: nn.Module, parameter: str, tensor: Tensor) -> None:
    # a memory-mapped tensor that needed no conversion would keep the file open and read from disk while running
    setattr(module, parameter, nn.Parameter(tensor.contiguous().clone(), requires_grad=False))
