"""A safetensors file in pieces, read back by safetensors."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantize.shard import layout_bytes, write_shard

TENSORS = {
    "odd": torch.randn(7, 3),
    "a": torch.randn(5, 4).to(torch.bfloat16),
    "transformer.h.0.ln_1.weight": torch.randn(9).half(),
    "words": torch.randint(-(2**31), 2**31, (4, 6)).to(torch.int32),
}
LAYOUT = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def rows(name: str) -> Iterator[Tensor]:
    return iter(TENSORS[name].split(2))


def test_pieces_read_back_as_whole_tensors(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", LAYOUT, rows)
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert layout_bytes(LAYOUT) == sum(tensor.nbytes for tensor in TENSORS.values())


@pytest.mark.parametrize("pieces", [1, 3], ids=["too few", "too many"])
def test_pieces_that_do_not_add_up_leave_no_file(pieces: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"odd has 21 values, and its pieces {14 * pieces}"):
        write_shard(tmp_path / "a.safetensors", LAYOUT, lambda name: [torch.ones(14)] * pieces)
    assert list(tmp_path.iterdir()) == []


def test_a_piece_of_another_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"odd is torch\.float32, and a piece of it torch\.float16"):
        write_shard(tmp_path / "a.safetensors", LAYOUT, lambda name: [TENSORS[name].half()])
    assert list(tmp_path.iterdir()) == []
