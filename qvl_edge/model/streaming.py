"""Parts of a model in float32, their weights read from the checkpoint when they run: never all of them in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.errors import CheckpointError
from qvl_edge.model.loading import check_tensors
from qvl_edge.model.vit import VisionTransformer

OnStage = Callable[[int, Tensor], None]
"""on_stage(stage, output): stage 0 ends with ln_pre, stage 1 … with a block; output (B, patches, width) float32."""
_ROWS = 1024  # rows per slice: checked at once, a tensor would need a copy of its own size


def is_finite(tensor: Tensor) -> bool:
    """Whether `tensor` holds neither NaN nor infinity."""
    return all(bool(torch.isfinite(rows).all()) for rows in tensor.split(_ROWS))


def check_finite(name: str, tensor: Tensor) -> None:
    """CheckpointError if the checkpoint's tensor `name` holds NaN or infinity."""
    if not is_finite(tensor):
        raise CheckpointError(
            f"{name} holds NaN or infinity: the checkpoint is damaged, or its training diverged; copy it again, or "
            "take an earlier one"
        )


def load_part(
    module: nn.Module, checkpoint: Checkpoint, prefix: str, device: torch.device | str, *, recurse: bool = True
) -> None:
    """Give `module`, built on the meta device, its parameters `{prefix}{name}` in float32.

    recurse=False: only its own, not those of its submodules. CheckpointError names a tensor that is not finite.
    """
    for name, _ in list(module.named_parameters(recurse=recurse)):
        full = f"{prefix}{name}"
        # always a copy: the pages of a mapped file are given back, and their alignment can change a product's last bit
        tensor = checkpoint[full].to(device=device, dtype=torch.float32, copy=True)
        checkpoint.release(full)
        check_finite(full, tensor)
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))


def stream_vision(
    checkpoint: Checkpoint, *, device: torch.device | str = "cpu", on_stage: OnStage = lambda stage, output: None
) -> VisionTransformer:
    """The vision tower, each part of which has its weights only while it runs (published: 7.7 GB as a whole).

    Call it under torch.inference_mode. CheckpointError if tensors are missing or of other shapes, and, while it runs,
    if one is not finite.
    """
    check_tensors(checkpoint, decoder=False)
    visual = checkpoint.config.visual
    with torch.device("meta"):
        tower = VisionTransformer(visual).eval()
    load_part(tower, checkpoint, VISUAL, device, recurse=False)

    def stream(name: str, stage: int | None = None) -> None:
        def begin(module: nn.Module, _: Any) -> None:
            load_part(module, checkpoint, f"{VISUAL}{name}.", device)

        def end(module: nn.Module, _: Any, output: Tensor) -> None:
            module.to("meta")
            if stage is not None:
                on_stage(stage, output)

        part = tower.get_submodule(name)
        part.register_forward_pre_hook(begin)
        part.register_forward_hook(end)

    stream("conv1")
    stream("ln_pre", 0)
    for index in range(visual.layers):
        stream(f"transformer.resblocks.{index}", index + 1)
    stream("attn_pool")
    stream("ln_post")
    return tower
