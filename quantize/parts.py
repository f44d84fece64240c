"""A part of the model in float32, its weights read from the checkpoint when it is needed."""

import torch
from torch import nn

from quantize.finite import is_finite
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.errors import CheckpointError


def load_part(
    module: nn.Module, checkpoint: Checkpoint, prefix: str, device: torch.device | str, *, recurse: bool = True
) -> None:
    """Give `module`, made on the meta device, its tensors `{prefix}{parameter}` in float32.

    With recurse=False only the parameters that are its own. CheckpointError names a tensor that is not finite.
    """
    for name, _ in list(module.named_parameters(recurse=recurse)):
        full = f"{prefix}{name}"
        # a copy always: a mapped file is read again and again, and its alignment can change the last bit of a product
        tensor = checkpoint[full].to(device=device, dtype=torch.float32, copy=True)
        checkpoint.release(full)
        if not is_finite(tensor):
            raise CheckpointError(f"{full} holds NaN or infinity; the checkpoint is damaged, copy it again")
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
