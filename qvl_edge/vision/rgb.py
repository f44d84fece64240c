"""A picture's pixels as they are stored -> RGB as they are shown, turned and over a background, strip by strip.

Whole, the RGB would take 4 bytes a pixel beside a picture of one bit a pixel, and the steps on the way more.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageColor

from qvl_edge.errors import ConfigError

BACKGROUND = "white"  # behind transparent pixels: what a browser shows
UPSTREAM_BACKGROUND = "none"  # transparency is dropped, as convert("RGB") does: whatever colour was behind it appears
_STRIP = 128  # rows that are in memory as RGB at once
# by orientation, 1 to 8; from 5 on the sides change places
TURNS: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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


def shown_size(image: Image.Image, turn: int) -> tuple[int, int]:
    """(width, height) once it is turned."""
    return image.size[::-1] if turn > 4 else image.size


def strips(image: Image.Image, turn: int, background: str, *, down: bool = True) -> Iterator[tuple[int, Image.Image]]:
    """(first row, RGB strip) of the picture as it is shown, from the top down; or by columns, from the left."""
    width, height = image.size
    rows = down != (turn > 4)  # whether a strip is rows of the stored picture
    length = height if rows else width
    for start in range(0, length, _STRIP):
        end = min(start + _STRIP, length)
        backwards = turn in ((3, 4, 7, 8) if down else (2, 3, 6, 7))
        first, last = (length - end, length - start) if backwards else (start, end)
        strip = _to_rgb(image.crop((0, first, width, last) if rows else (first, 0, last, height)), image, background)
        yield start, strip.transpose(TURNS[turn]) if turn != 1 else strip


def squeeze(image: Image.Image, turn: int, background: str, size: int) -> Image.Image:
    """The picture resized to a square of `size`, to the last bit as if it were resized whole.

    Pillow resizes one side and rounds to 8 bits, then the other, so the first half can be done strip by strip. JPEG's
    own smaller sizes (`draft`) would take less memory, but they are other pixels: of a photo of 4000 x 3000, 62%
    differ, by up to 17 of 255 levels, and the original decodes in full.
    """
    width, height = shown_size(image, turn)
    # the height first, where it shrinks twice as much as the width (Pillow 13; before, the width always came first)
    tall = height - size > max(0, 2 * (width - size)) and _takes_height_first()
    narrow = Image.new("RGB", (width, size) if tall else (size, height))
    for start, strip in strips(image, turn, background, down=not tall):
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
