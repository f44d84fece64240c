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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageFile, UnidentifiedImageError

from qvl_edge.errors import ConfigError, ImageError
from qvl_edge.vision import formats, tiff
from qvl_edge.vision.source import ImageLike, read_source

if TYPE_CHECKING:  # a process that only decodes does without
    from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures (Qwen-VL visual.py)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 64_000_000  # width x height, read from the header before anything is decoded
MAX_SIDE = 1 << 17  # pixels; resizing takes image_size x height pixels in between
MAX_SCAN_PIXELS = 16 * MAX_PIXELS  # of a progressive JPEG, whose pixels are gone over once a scan; cameras write 10
BACKGROUND = "white"  # behind transparent pixels: what a browser shows
UPSTREAM_BACKGROUND = "none"  # transparency is dropped, as convert("RGB") does: whatever colour was behind it appears
_STRIP = 128  # rows that are in memory as RGB at once
_TURNS: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
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
    with _opened(image, accepted) as (opened, turn, frame):
        return Picture(_squeeze(opened, turn, frame, image_size, background), frame)


def load_image(image: ImageLike, *, background: str = BACKGROUND) -> Image.Image:
    """The whole picture as RGB, turned as its orientation says, over `background`. ImageError as load_picture."""
    check_background(background)
    with _opened(image) as (opened, turn, frame):
        whole = Image.new("RGB", frame.size)
        for top, strip in _strips(opened, turn, background):
            whole.paste(strip, (0, top))
    return whole


def load_frame(image: ImageLike, accepted: Sequence[str] | None = None) -> Frame:
    """The frame of an image by its header; nothing is decoded. accepted: formats (default: all that can be read)."""
    with _opened(image, accepted) as (_, _, frame):
        return frame


def check_background(background: str) -> str:
    """ConfigError if it is no colour that Pillow knows ("white", "#rrggbb", "hsl(…)"), nor "none"."""
    try:
        if background != UPSTREAM_BACKGROUND:
            ImageColor.getcolor(background, "RGB")
    except (ValueError, AttributeError):
        raise ConfigError(
            f"background is {str(background)[:40]!r}; expected a colour such as 'white' or '#ffffff', or 'none' for "
            "whatever is behind the transparency, as upstream"
        ) from None
    return background


@contextlib.contextmanager
def _opened(given: ImageLike, accepted: Sequence[str] | None = None) -> Iterator[tuple[Image.Image, int, Frame]]:
    """The image with its orientation and frame; whatever is wrong with it, there or later, becomes an ImageError."""
    source, where = read_source(given)
    with _DECODING, warnings.catch_warnings(), contextlib.ExitStack() as closing:
        warnings.filterwarnings("ignore", module=r"PIL\b|pillow_heif|qvl_edge\.vision")
        try:
            if isinstance(source, Image.Image):
                image, turn = source, _orientation(source)
            else:
                image, turn = _open(source, accepted)
                closing.enter_context(image)
            width, height = image.size[::-1] if turn > 4 else image.size
            _check_size(width, height)
            if not isinstance(source, Image.Image):
                _check_scans(image, source)
            yield image, turn, Frame(width, height, turn != 1)
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
    if isinstance(error, NotImplementedError) or _UNSUPPORTED.search(words):
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
        if turn := tiff.xmp_orientation(xmp.encode() if isinstance(xmp, str) else xmp) - 1:
            return turn + 1
        if not isinstance(image, ImageFile.ImageFile):  # made by the caller, who may have set the tag
            return int(image.getexif().get(tiff.ORIENTATION, 1)) if image.getexif() else 1
    except Exception:  # of metadata, which says nothing about the pixels
        pass
    return 1


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


def _strips(image: Image.Image, turn: int, background: str, *, down: bool = True) -> Iterator[tuple[int, Image.Image]]:
    """(first row, RGB strip) of the picture as it is shown, from the top down; or by columns, from the left."""
    width, height = image.size
    rows = down != (turn > 4)  # whether a strip is rows of the stored picture
    length = height if rows else width
    for start in range(0, length, _STRIP):
        end = min(start + _STRIP, length)
        backwards = turn in ((3, 4, 7, 8) if down else (2, 3, 6, 7))
        first, last = (length - end, length - start) if backwards else (start, end)
        strip = _to_rgb(image.crop((0, first, width, last) if rows else (first, 0, last, height)), image, background)
        yield start, strip.transpose(_TURNS[turn]) if turn != 1 else strip


def _squeeze(image: Image.Image, turn: int, frame: Frame, size: int, background: str) -> Image.Image:
    """The picture resized to a square, to the last bit as if it were resized whole.

    Pillow resizes one side and rounds to 8 bits, then the other, so the first half can be done strip by strip. JPEG's
    own smaller sizes (`draft`) would take less memory, but they are other pixels: of a photo of 4000 x 3000, 62%
    differ, by up to 17 of 255 levels, and the original decodes in full.
    """
    # the height first, where it shrinks twice as much as the width (Pillow 13; before, the width always came first)
    tall = frame.height - size > max(0, 2 * (frame.width - size)) and _takes_height_first()
    narrow = Image.new("RGB", (frame.width, size) if tall else (size, frame.height))
    for start, strip in _strips(image, turn, background, down=not tall):
        resized = strip.resize((strip.width, size) if tall else (size, strip.height), Image.Resampling.BICUBIC)
        narrow.paste(resized, (start, 0) if tall else (0, start))
    return narrow.resize((size, size), Image.Resampling.BICUBIC)


@functools.cache
def _takes_height_first() -> bool:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 8), dtype=np.uint8))
    first = noise.resize((8, 4), Image.Resampling.BICUBIC).resize((4, 4), Image.Resampling.BICUBIC)
    return noise.resize((4, 4), Image.Resampling.BICUBIC).tobytes() == first.tobytes()


def _to_rgb(strip: Image.Image, image: Image.Image, background: str) -> Image.Image:
    """A strip of the image as RGB. What is transparent shows the background."""
    if strip.mode.startswith(("I", "F")):
        strip = _to_grey(strip, image)
    if background == UPSTREAM_BACKGROUND or not strip.has_transparency_data:
        return strip.convert("RGB")
    if strip.mode == "La":
        strip = strip.convert("LA")
    strip = strip.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", strip.size, background), strip).convert("RGB")


def _to_grey(strip: Image.Image, image: Image.Image) -> Image.Image:
    """16-bit, integer and float greys as 8 bits: from black to the type's white, which convert("RGB") clips at 255."""
    levels = np.asarray(strip)
    tags: Any = getattr(image, "tag_v2", {})
    bits, signed = (tags.get(258) or (16,))[0], (tags.get(339) or (1,))[0] == 2
    white: float
    if strip.mode == "F":  # 1 in files, TIFF and PFM; 255 where Pillow made it, by convert("F")
        white = 1.0 if image.format else 255.0
    else:  # Pillow reads 16-bit greys as I;16 or I, and unsigned 32-bit ones as signed
        white = 2 ** (bits - signed) - 1
        levels = levels.view(np.uint32) if bits == 32 and not signed and levels.dtype == np.int32 else levels
    scaled = np.nan_to_num(levels * (255 / white), nan=0.0).clip(0, 255).round().astype(np.uint8)
    grey = Image.fromarray(255 - scaled if tags.get(262) == 0 else scaled)
    if isinstance(level := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(levels == level, 0, 255).astype(np.uint8)))
    return grey


def to_pixels(images: list[Image.Image], image_size: int) -> "Tensor":
    """RGB pictures -> normalized pixels (B, 3, image_size, image_size) float32.

    As upstream: the picture is squeezed to a square bicubically, scaled to [0, 1], then (x - MEAN) / STD (visual.py).
    """
    import torch

    arrays = [np.asarray(image.resize((image_size, image_size), Image.Resampling.BICUBIC)) for image in images]
    raw = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return ((raw - mean) / std).contiguous()


def content_key(image: Image.Image) -> str:
    """sha256 of an RGB picture's size and pixels: the key under which its features are cached."""
    digest = hashlib.sha256(repr(image.size).encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
