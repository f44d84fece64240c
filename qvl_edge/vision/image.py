"""An image of any accepted kind -> an RGB picture as its sender saw it -> the model's pixels."""

import contextlib
import ctypes
import functools
import hashlib
import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from qvl_edge.errors import ImageError
from qvl_edge.vision import formats, tiff
from qvl_edge.vision.rgb import BACKGROUND, TURNS, check_background, shown_size, squeeze, strips
from qvl_edge.vision.source import ImageLike, read_source

if TYPE_CHECKING:  # a process that only decodes does without
    from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures (Qwen-VL visual.py)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 64_000_000  # width x height, read from the header before anything is decoded
MAX_SIDE = 1 << 17  # pixels; resizing takes image_size x height pixels in between
MAX_SCAN_PIXELS = 16 * MAX_PIXELS  # of a progressive JPEG, whose pixels are gone over once a scan; cameras write 10
_UNSUPPORTED = re.compile(
    r"unsupported|not supported|not implemented|not available|cannot (?:find|load|handle|identify)|unknown", re.I
)
# One picture is decoded at a time: a process has at most one of MAX_PIXELS in memory. The filters of Python's warnings,
# which Pillow sends by the thousand for odd metadata, belong to the whole process too.
_DECODING = threading.RLock()


class Frame(NamedTuple):
    """A picture's size in pixels as it is shown, the frame of all boxes; whether that took a turn of the stored one."""

    width: int
    height: int
    turned: bool

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.width, self.height


@dataclass(frozen=True, eq=False)
class Picture:
    """What is kept of an image: the square that the model sees, RGB, and the frame that its boxes are in."""

    square: Image.Image
    frame: Frame


def load_picture(
    image: "ImageLike | Picture",
    image_size: int,
    *,
    background: str = BACKGROUND,
    accepted: Sequence[str] | None = None,
) -> Picture:
    """The picture as the model sees it. It is never in memory whole as RGB: that would be 4 bytes a pixel more.

    A Picture stays as it is. accepted: formats of files (default: all that can be read).
    ImageError says why an image cannot be read or is refused.
    """
    if isinstance(image, Picture):
        if image.square.size != (image_size, image_size):
            raise ImageError(f"the Picture is {image.square.size[0]} pixels wide, the model takes {image_size}")
        return image
    check_background(background)
    with _opened(image, accepted) as (opened, turn):
        opened.load()  # before its size is believed
        frame = _frame(opened, turn)
        return Picture(squeeze(opened, turn, background, image_size), frame)


def load_image(image: ImageLike, *, background: str = BACKGROUND) -> Image.Image:
    """The whole picture as RGB, turned as its orientation says, over `background`. ImageError as load_picture."""
    check_background(background)
    with _opened(image) as (opened, turn):
        opened.load()
        whole = Image.new("RGB", _frame(opened, turn).size)
        for top, strip in strips(opened, turn, background):
            whole.paste(strip, (0, top))
    return whole


def load_frame(image: ImageLike, accepted: Sequence[str] | None = None) -> Frame:
    """The frame of an image by its header; nothing is decoded. accepted: formats (default: all that can be read)."""
    with _opened(image, accepted) as (opened, turn):
        return _frame(opened, turn)


@contextlib.contextmanager
def _opened(given: ImageLike, accepted: Sequence[str] | None = None) -> Iterator[tuple[Image.Image, int]]:
    """The image, not decoded yet if it is a file, and its orientation. Whatever is wrong, here or later, becomes an
    ImageError."""
    source, where = read_source(given)
    with _DECODING, warnings.catch_warnings(), contextlib.ExitStack() as closing:
        warnings.filterwarnings("ignore", module=r"PIL\b|pillow_heif|qvl_edge\.vision")
        try:
            if isinstance(source, Image.Image):
                image, turn = source, _orientation(source)
            else:
                image, turn = _open(source, accepted)
                closing.enter_context(image)
            _frame(image, turn)
            if not isinstance(source, Image.Image):
                _check_scans(image, source)
            yield image, turn
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises many types on damaged files
            raise ImageError(f"{where} {_reason(error, is_file=not isinstance(source, Image.Image))}") from None


def _reason(error: Exception, *, is_file: bool) -> str:
    if isinstance(error, ImageError):
        return str(error)
    words = (str(error) or type(error).__name__)[:200]
    if isinstance(error, Image.DecompressionBombError):  # "Image size (280000000 pixels) exceeds limit of …"
        pixels = re.search(r"\d+", words)
        return _too_large(f"has {int(pixels[0]) / 1e6:.1f} Mpixel" if pixels else words)
    unknown = KeyError in (type(error), type(error.__cause__))  # in a table of Pillow's
    if unknown or isinstance(error, NotImplementedError) or _UNSUPPORTED.search(words):
        return f"is of a kind that Pillow does not read ({words}); save it as PNG or JPEG"
    return f"cannot be decoded: {words}" + ("; the file is damaged or cut" if is_file else "")


def _open(content: bytes, accepted: Sequence[str] | None) -> tuple[Image.Image, int]:
    """An image file whose pixels are not decoded yet, and its orientation."""
    if not content:
        raise ImageError("is empty (0 bytes)")
    formats.check_before_opening(content)
    for width, height in formats.inner_sizes(content):
        _check_size(width, height)
    stored, turn = content, 0
    if formats.name_of(content) == "PNG":
        stored = formats.essential_png(content)
    elif formats.name_of(content) == "TIFF":
        _quiet_libtiff()
        stored, turn = tiff.upright(content)
    for group in formats.readers(content):
        tried = [name for name in group if accepted is None or name in accepted]
        with contextlib.suppress(UnidentifiedImageError):
            image = Image.open(io.BytesIO(stored), formats=tried)
            return image, turn or _orientation(image)
    name = formats.name_of(content)
    if name in Image.OPEN and (accepted is None or name in accepted):
        Image.OPEN[name][0](io.BytesIO(stored), "").close()  # its reader says why, which Image.open keeps to itself
    raise ImageError(formats.unreadable(content, tuple(accepted or formats.served_formats())))


@functools.cache
def _quiet_libtiff() -> None:
    """No lines about damaged TIFFs, of which libtiff writes one to stderr for each row of a fax; the errors stay."""
    logging.getLogger("PIL.TiffImagePlugin").addFilter(lambda _: False)
    with contextlib.suppress(OSError, AttributeError):  # built in, on Windows
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


def _orientation(image: Image.Image) -> int:
    """1 to 8, by EXIF or else by XMP; 1 where there is none or it makes no sense."""
    if isinstance(image, ImageFile.ImageFile) and image.format in ("TIFF", formats.HEIF):
        return 1  # Pillow and pillow-heif turn these themselves
    try:
        if "exif" in image.info:
            return tiff.orientation(image.info["exif"])
        if text := image.info.get("Raw profile type exif"):  # ImageMagick's: lines of hex behind a name and a length
            return tiff.orientation(bytes.fromhex("".join(str(text).split()[2:])))
        xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
        if (turn := tiff.xmp_orientation(xmp.encode() if isinstance(xmp, str) else xmp)) != 1:
            return turn
        if not isinstance(image, ImageFile.ImageFile):  # made by the caller, who may have set the tag
            turn = image.getexif().get(tiff.ORIENTATION, 1)
            return turn if turn in TURNS else 1
    except Exception:  # of metadata, which says nothing about the pixels
        pass
    return 1


def _frame(image: Image.Image, turn: int) -> Frame:
    _check_size(*image.size)
    return Frame(*shown_size(image, turn), turn != 1)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(_too_large(f"is {width} x {height} = {width * height / 1e6:.1f} Mpixel"))
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"is {width} x {height}, at most {MAX_SIDE} pixels a side are decoded; cut it into parts")
    if width <= 0 or height <= 0:
        raise ImageError(f"is {width} x {height}: the image is empty")


def _too_large(what: str) -> str:
    return f"{what}, at most {MAX_PIXELS / 1e6:.0f} are decoded; shrink it (the model sees 448 x 448)"


def _check_scans(image: Image.Image, content: bytes) -> None:
    """A progressive JPEG may repeat a scan for ever: 12 bytes each, and a pass over all pixels."""
    if image.format in ("JPEG", "MPO") or "jpeg" in str(image.info.get("compression", "")):
        scans, pixels = content.count(b"\xff\xda"), image.size[0] * image.size[1]
        if scans * max(pixels, MAX_PIXELS // 64) > MAX_SCAN_PIXELS:
            raise ImageError(
                f"is a JPEG of {pixels / 1e6:.1f} Mpixel in {scans} scans; at most {MAX_SCAN_PIXELS / 1e6:.0f} Mpixel "
                "in all are decoded: save it again, as a plain JPEG"
            )


def to_pixels(images: list[Image.Image], image_size: int) -> "Tensor":
    """RGB pictures -> normalized pixels (B, 3, image_size, image_size) float32.

    As upstream: the picture is squeezed to a square bicubically, scaled to [0, 1], then (x - MEAN) / STD (visual.py).
    """
    import torch

    arrays = [np.asarray(image.resize((image_size, image_size), Image.Resampling.BICUBIC)) for image in images]
    raw = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return ((raw - mean) / std).contiguous()


def content_key(image: Image.Image, salt: str = "") -> str:
    """sha256 of an RGB picture's size and pixels: the key under which its features are cached, for those of `salt`."""
    digest = hashlib.sha256(f"{image.size}{salt}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
