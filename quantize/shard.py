"""A safetensors file written piece by piece, so that a shard of 2 GB passes through some megabytes of memory.

The format, as safetensors' README states it: the header's length in 8 bytes, little-endian; the header, JSON with each
tensor's dtype, shape and place [begin, end) in the data, padded with spaces; the data.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvl_edge.files import check_free_space, replacing

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}
_ALIGNMENT = 8  # of the data within the file, as safetensors' own writer has it

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""dtype and shape of each tensor of a file, in the order of its data."""


def layout_bytes(layout: Layout) -> int:
    """Bytes of the tensors of a file."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())


def write_shard(path: Path, layout: Layout, pieces: Callable[[str], Iterable[Tensor]]) -> None:
    """Write the tensors of `layout`, each as the pieces that `pieces(name)` yields; beside `path`, then renamed.

    Pieces are consecutive parts of the flattened tensor, on the CPU. ValueError if they do not add up to it;
    BundleError if the disk is too small.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + layout_bytes({name: (dtype, shape)})
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    check_free_space(path.parent, end)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with replacing(path) as partial, open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (dtype, shape) in layout.items():
            missing = math.prod(shape)
            for piece in pieces(name):
                if piece.dtype != dtype:
                    raise ValueError(f"{name} is {dtype}, and a piece of it {piece.dtype}")
                file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
                missing -= piece.numel()
            if missing:
                raise ValueError(f"{name} has {math.prod(shape)} values, and its pieces {math.prod(shape) - missing}")
