"""What enters a block, one sample after another, in a file: at 128 samples of 2,048 tokens it is 4.3 GB.

The file is read and written with ordinary calls rather than mapped. A sample is then in memory of its own, aligned
the same way in every run (alignment can change the last bit of a product), and pages that were read belong to the
system's cache, not to this process.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from qvl_edge.errors import BundleError
from qvl_edge.files import replacing

Put = Callable[[int, int, Tensor], None]
"""put(sample, first, rows): rows (R, hidden) float32 on the CPU become rows first … first + R - 1 of a sample."""


def activation_bytes(lengths: Sequence[int], width: int) -> int:
    """Bytes of a file for samples of `lengths` tokens."""
    return 4 * width * sum(lengths)


@contextmanager
def writing(path: Path, lengths: Sequence[int], width: int) -> Iterator[Put]:
    """A file for samples of `lengths` tokens and `width` channels, which appears at `path` when the context ends well.

    BundleError if the disk is full.
    """
    starts = _starts(lengths, width)
    with replacing(path) as partial, open(partial, "wb") as file:
        file.truncate(activation_bytes(lengths, width))

        def put(sample: int, first: int, rows: Tensor) -> None:
            file.seek(starts[sample] + activation_bytes([first], width))
            file.write(rows.contiguous().numpy().data)

        yield put


class Activations(Sequence[Tensor]):
    """The samples (T, width) float32 of a written file; each is read when asked for.

    BundleError if the file is not as large as samples of `lengths` tokens are.
    """

    def __init__(self, path: Path, lengths: Sequence[int], width: int):
        self.path, self.lengths, self.width = path, lengths, width
        expected, found = activation_bytes(lengths, width), path.stat().st_size
        if found != expected:
            raise BundleError(
                f"{path} has {found} bytes, and these samples have {expected}; add --overwrite to start again"
            )
        self._starts = _starts(lengths, width)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        """Sample `index`, on the CPU."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        sample = torch.empty(self.lengths[index], self.width)
        with open(self.path, "rb") as file:
            file.seek(self._starts[index])
            file.readinto(sample.numpy().data)
        return sample


def _starts(lengths: Sequence[int], width: int) -> list[int]:
    return [activation_bytes(lengths[:index], width) for index in range(len(lengths))]
