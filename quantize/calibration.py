"""What enters the first block: the embeddings of the calibration samples, and the features of their pictures."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantize.activations import Put
from quantize.pictures import encode_pictures
from quantize.progress import Tick
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.errors import CalibrationError
from qvl_edge.text.conversations import Sample
from qvl_edge.vision.image import ImageLike

WTE = "transformer.wte.weight"


def embed_samples(checkpoint: Checkpoint, samples: Sequence[Sample], put: Put, *, device: str, tick: Tick) -> None:
    """Put what enters the first block: embeddings, and the features of its pictures in each one's slots.

    CalibrationError names a sample whose values are not finite.
    """
    table = checkpoint[WTE]
    pictures: dict[str, ImageLike] = {}
    slots: dict[str, list[tuple[int, int]]] = {}  # where the features of each picture go: sample, first row
    for number, sample in enumerate(samples):
        rows = table[torch.tensor(sample.ids)].float()
        if not bool(torch.isfinite(rows).all()):
            raise CalibrationError(f"{sample.where}: its embeddings hold NaN or infinity")
        put(number, 0, rows)
        checkpoint.release(WTE)
        for start, key, image in zip(sample.image_starts, sample.image_keys, sample.images, strict=True):
            pictures[key] = image
            slots.setdefault(key, []).append((number, start))

    def place(key: str, features: Tensor) -> None:
        if not bool(torch.isfinite(features).all()):
            raise CalibrationError(f"{samples[slots[key][0][0]].where}: its picture's features hold NaN or infinity")
        for number, start in slots[key]:
            put(number, start, features)

    if pictures:
        encode_pictures(checkpoint, pictures, place, device=device, tick=tick)
