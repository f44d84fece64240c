"""Whether a tensor holds NaN or infinity, asked in slices: at once the question takes more memory than the tensor."""

import torch
from torch import Tensor

_ROWS = 1024


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite."""
    return all(bool(torch.isfinite(rows).all()) for rows in tensor.split(_ROWS))
