"""An image of any accepted kind -> an RGB picture -> the model's pixels."""

import base64
import binascii
import hashlib
import io
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from qvl_edge.errors import ImageError

ImageLike: TypeAlias = str | PathLike[str] | bytes | Image.Image | np.ndarray[Any, Any]
"""A path, a data URI, the bytes of a file, a PIL image, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8."""

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures (Qwen-VL visual.py)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 50_000_000  # width x height, read from the header before anything is decoded
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_FILE_BYTES = 100 << 20


def load_image(image: ImageLike) -> Image.Image:
    """The picture as RGB.

    The first frame of an animation is taken, EXIF orientation is applied, transparency is dropped as upstream does
    (convert("RGB") keeps the colour behind it). ImageError says why an image cannot be read or is refused.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image, "the PIL image")
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return _decode(bytes(image), f"{len(image)} bytes")
    if isinstance(image, str) and image.startswith("data:"):
        return _decode(_from_data_uri(image), "the data URI")
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        raise ImageError(
            f"{image} is a URL; nothing is fetched here. Download it and give the file, its bytes or a data URI"
        )
    if isinstance(image, str | PathLike):
        return _decode(_read_file(Path(image)), str(image))
    raise ImageError(
        f"an image cannot be a {type(image).__name__}; give a path, bytes, a PIL image, a numpy array or a data URI"
    )


def _read_file(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ImageError(f"{path} is not a file")
        if size > MAX_FILE_BYTES:
            raise ImageError(f"{path} has {size} bytes, at most {MAX_FILE_BYTES} are read; shrink the image")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}") from None


def _from_data_uri(uri: str) -> bytes:
    header, comma, body = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ImageError(f"{uri[:40]!r}… is not a base64 data URI; expected data:image/png;base64,…")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ImageError(f"the data URI is not valid base64: {error}") from None


def _from_array(array: "np.ndarray[Any, Any]") -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(
            f"the array is {array.dtype} of shape {array.shape}; expected uint8 of shape (H, W), (H, W, 3) or (H, W, 4)"
        )
    if array.size == 0:
        raise ImageError(f"the array has shape {array.shape}: the image is empty")
    return _to_rgb(Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array), "the array")


def _decode(content: bytes, where: str) -> Image.Image:
    if not content:
        raise ImageError(f"{where}: the image is empty (0 bytes)")
    try:
        # Image.open reads the header only; the pixels are decoded after the size is known
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return _to_rgb(image, where)
    except UnidentifiedImageError:
        raise ImageError(f"{where} is not an image that can be read; accepted are {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{where}: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{where} cannot be decoded: {error}; the file is damaged or cut") from None


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{where} is {width} x {height} = {width * height / 1e6:.1f} Mpixel, at most {MAX_PIXELS / 1e6:.0f} are "
            "decoded; shrink it (the model sees 448 x 448)"
        )
    if width == 0 or height == 0:
        raise ImageError(f"{where} is {width} x {height}: the image is empty")
    if getattr(image, "is_animated", False):
        image.seek(0)
    if image.mode.startswith(("I", "F")):  # 16-bit and float greys: convert("RGB") would clip them to white
        levels = np.asarray(image, dtype=np.float64)
        span = 65535.0 if image.mode.startswith("I;16") or levels.max() > 255 else 255.0
        image = Image.fromarray((levels / span * 255).clip(0, 255).round().astype(np.uint8))
    return (ImageOps.exif_transpose(image) or image).convert("RGB")


def to_pixels(images: list[Image.Image], image_size: int) -> Tensor:
    """RGB pictures -> normalized pixels (B, 3, image_size, image_size) float32.

    As upstream: the picture is squeezed to a square bicubically, scaled to [0, 1], then (x - MEAN) / STD (visual.py).
    """
    arrays = [np.asarray(image.resize((image_size, image_size), Image.Resampling.BICUBIC)) for image in images]
    raw = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return ((raw - mean) / std).contiguous()


def content_key(image: Image.Image) -> str:
    """sha256 of an RGB picture's size and pixels: the key under which its features are cached."""
    digest = hashlib.sha256(repr(image.size).encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
