"""Features of the calibration pictures, by a vision tower that is never in memory as a whole.

In float32 the published tower takes 7.7 GB. Here a group of pictures goes through it block by block, each block's
weights being read when it is its turn.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantize.parts import load_part
from quantize.progress import Tick
from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.model.loading import check_tensors
from qvl_edge.model.vit import VisionTransformer
from qvl_edge.vision.image import ImageLike, load_image, to_pixels

GROUP = 16  # pictures that go through the tower together: 2 GB of activations, and the weights are read once for all


@torch.inference_mode()
def encode_pictures(
    checkpoint: Checkpoint,
    pictures: Mapping[str, ImageLike],
    done: Callable[[str, Tensor], None],
    *,
    device: torch.device | str,
    tick: Tick,
) -> None:
    """Call `done` with each picture's key and features (256, hidden) float32 on the CPU."""
    visual = checkpoint.config.visual
    keys = list(pictures)
    groups = [keys[start : start + GROUP] for start in range(0, len(keys), GROUP)]
    group = 0

    def block_done(block: int) -> None:
        share = (group + (block + 1) / visual.layers) / len(groups)
        tick(share, f"encoding pictures, group {group + 1}/{len(groups)}: block {block + 1}/{visual.layers}")

    tower = _tower(checkpoint, device, block_done)
    for group, members in enumerate(groups):  # noqa: B007 (block_done reads it)
        pixels = to_pixels([load_image(pictures[key]) for key in members], visual.image_size).to(device)
        for key, features in zip(members, tower(pixels).cpu(), strict=True):
            done(key, features)


def _tower(checkpoint: Checkpoint, device: torch.device | str, block_done: Callable[[int], None]) -> VisionTransformer:
    """The tower with weights on the meta device; those of a part are there while it runs."""
    check_tensors(checkpoint, decoder=False)
    with torch.device("meta"):
        tower = VisionTransformer(checkpoint.config.visual).eval()
    load_part(tower, checkpoint, VISUAL, device, recurse=False)

    def stream(name: str, block: int | None = None) -> None:
        def begin(module: nn.Module, _: Any) -> None:
            load_part(module, checkpoint, f"{VISUAL}{name}.", device)

        def end(module: nn.Module, *_: Any) -> None:
            module.to("meta")
            if block is not None:
                block_done(block)

        part = tower.get_submodule(name)
        part.register_forward_pre_hook(begin)
        part.register_forward_hook(end)

    for name in ("conv1", "ln_pre", "attn_pool", "ln_post"):
        stream(name)
    for block in range(checkpoint.config.visual.layers):
        stream(f"transformer.resblocks.{block}", block)
    return tower
