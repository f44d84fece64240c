"""Image features cached by content, so that an image seen before is not encoded again."""

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image
from torch import Tensor

from qvl_edge.vision.image import content_key, to_pixels


class Encoder(Protocol):
    """What turns pixels into features: `engine.vision.VisionEncoder`."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) float32 -> features (B, 256, hidden)."""
        ...


@dataclass(frozen=True, eq=False)
class Encoded:
    """Pictures as features (256, hidden) on the CPU, with the content key of each; how many were cached, and the
    seconds that the others took."""

    keys: list[str]
    features: list[Tensor]
    cached: int
    seconds: float


class FeatureCache:
    """Encodes pictures and keeps the features of the latest `capacity` (256 x hidden each)."""

    def __init__(self, encoder: Encoder, image_size: int, *, capacity: int = 32):
        self.encoder, self.image_size, self.capacity = encoder, image_size, capacity
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()  # one encoder, and callers on any thread

    def encode(self, images: Sequence[Image.Image], salt: str = "") -> "Encoded":
        """The features of each RGB picture, from the cache where it was seen before under the same salt."""
        keys = [content_key(image, salt) for image in images]
        with self._lock:
            missing = {key: image for key, image in zip(keys, images, strict=True) if key not in self._features}
            cached = sum(key not in missing for key in keys)
            began = time.perf_counter()
            found = {key: self._features[key] for key in keys if key in self._features}
            if missing:
                encoded = self.encoder.encode(to_pixels(list(missing.values()), self.image_size)).cpu()
                found |= dict(zip(missing, encoded.unbind(0), strict=True))
            seconds = time.perf_counter() - began
            for key in keys:
                self._features[key] = found[key]
                self._features.move_to_end(key)
            while len(self._features) > self.capacity:
                self._features.popitem(last=False)
        return Encoded(keys, [found[key] for key in keys], cached, seconds)

    def holds(self, images: Sequence[Image.Image], salt: str = "") -> bool:
        """Whether all of them are in the cache."""
        return all(content_key(image, salt) in self._features for image in images)

    def forget(self) -> None:
        """Drop all features."""
        self._features.clear()
