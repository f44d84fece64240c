"""What enters a decoder block on the calibration samples: made for the first block, kept in a file for every one.

At 128 samples of 2,048 tokens such a file has 4.3 GB. It is read and written with ordinary calls rather than mapped: a
sample is then in memory of its own, aligned the same way in every run (alignment can change the last bit of a product),
and pages that were read belong to the system's cache, not to this process.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from qvl_edge.checkpoint import Checkpoint
from qvl_edge.errors import BundleError, CalibrationError
from qvl_edge.files import replacing
from qvl_edge.model.streaming import stream_vision
from qvl_edge.text.conversations import Sample
from qvl_edge.vision.image import ImageLike, load_picture, to_pixels

WTE = "transformer.wte.weight"
GROUP = 16  # pictures per pass through the vision tower: 2 GB of activations, and the weights are read once for all

Put = Callable[[int, int, Tensor], None]
"""put(sample, first, rows): rows (R, hidden) float32 on the CPU become rows first … first + R - 1 of a sample."""


def activation_bytes(lengths: Sequence[int], width: int) -> int:
    """Bytes of the file for samples of `lengths` tokens and `width` channels."""
    return 4 * width * sum(lengths)


@contextmanager
def writing(path: Path, lengths: Sequence[int], width: int) -> Iterator[Put]:
    """Write samples of `lengths` tokens and `width` channels; `path` appears when the context ends without an error.

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
    """The samples (T, width) float32 of a written file, each read when indexed.

    BundleError if the file's size is not that of samples of `lengths` tokens.
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


@torch.inference_mode()
def embed_samples(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    put: Put,
    *,
    device: torch.device | str,
    say: Callable[[str], None],
) -> None:
    """Put what enters the first block: token embeddings, with the features of each picture in its slots.

    Each picture is encoded once, GROUP at a time. CalibrationError names a sample whose values are not finite.
    """
    table = checkpoint[WTE]
    pictures: dict[str, ImageLike] = {}
    slots: dict[str, list[tuple[int, int]]] = {}  # where each picture's features go: sample, first row
    for number, sample in enumerate(samples):
        rows = table[torch.tensor(sample.ids)].float()
        if not bool(torch.isfinite(rows).all()):
            raise CalibrationError(f"{sample.where}: its embeddings hold NaN or infinity")
        put(number, 0, rows)
        checkpoint.release(WTE)
        for start, key, image in zip(sample.image_starts, sample.image_keys, sample.images, strict=True):
            pictures[key] = image
            slots.setdefault(key, []).append((number, start))
    if not pictures:
        return

    keys = list(pictures)
    groups = [keys[start : start + GROUP] for start in range(0, len(keys), GROUP)]
    visual, group = checkpoint.config.visual, 0

    def on_stage(stage: int, _: Tensor) -> None:
        say(f"encoding pictures, group {group + 1}/{len(groups)}: block {stage}/{visual.layers}")

    tower = stream_vision(checkpoint, device=device, on_stage=on_stage)
    for group, members in enumerate(groups):  # noqa: B007 (on_stage reads it)
        squares = [load_picture(pictures[key], visual.image_size).square for key in members]
        pixels = to_pixels(squares, visual.image_size).to(device)
        for key, features in zip(members, tower(pixels).cpu(), strict=True):
            if not bool(torch.isfinite(features).all()):
                where = samples[slots[key][0][0]].where
                raise CalibrationError(f"{where}: the features of its picture hold NaN or infinity")
            for number, start in slots[key]:
                put(number, start, features)
