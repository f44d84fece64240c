"""Boxes drawn on a picture, with labels that can be read."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from qvl_edge.text.boxes import Box
from qvl_edge.text.font import Run, find_font, split_runs

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]

PALETTE: tuple[Colour, ...] = (  # far apart in hue and lightness; a 13th label begins anew
    (230, 25, 75),
    (0, 130, 255),
    (60, 180, 75),
    (255, 215, 0),
    (145, 30, 180),
    (245, 130, 48),
    (0, 200, 200),
    (240, 50, 230),
    (128, 0, 0),
    (0, 0, 160),
    (190, 255, 60),
    (120, 85, 20),
)
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
READABLE = 3.5  # contrast from which white letters are taken; WCAG 2.1 asks 3 of large ones, and white reads calmer
LONGEST = 80  # characters of a label that are looked at


@dataclass(frozen=True)
class Style:
    """Sizes in pixels for a picture of a given size."""

    line: int
    font: int
    padding: int

    @classmethod
    def of(cls, width: int, height: int) -> "Style":
        """Lines and letters grow with the picture; letters stay readable, and below a third of a small picture."""
        side = (width * height) ** 0.5
        font = min(max(12, round(side * 0.03)), max(6, min(width, height) // 3))
        thinnest = 1 if min(width, height) < 120 else 2
        return cls(line=max(thinnest, round(side / 220)), font=font, padding=max(1, font // 5))


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A new RGB picture with the boxes drawn in, each label in one colour, on a plate that stays within the picture.

    Colours go by the order in which labels appear, so the same answer always looks the same. Quads are drawn as such.
    Boxes are taken as belonging to `image`, wherever their `image` field points.
    """
    picture = image.convert("RGB") if image.mode != "RGB" else image.copy()
    style = Style.of(*picture.size)
    draw = ImageDraw.Draw(picture)
    labels = list(dict.fromkeys(box.label for box in boxes))
    colours = {label: PALETTE[index % len(PALETTE)] for index, label in enumerate(labels)}
    # large ones first, so that no small one is hidden
    for box in sorted(boxes, key=lambda box: -_area(box.pixels)):
        _outline(draw, box, colours[box.label], style, picture.size)
    plates: list[Rectangle] = []
    for box in boxes:
        if box.label:
            plates.append(_plate(draw, box, colours[box.label], style, picture.size, plates))
    return picture


def _area(box: Rectangle) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _outline(draw: ImageDraw.ImageDraw, box: Box, colour: Colour, style: Style, size: tuple[int, int]) -> None:
    corners = box.quad_pixels
    if corners is None:
        x1, y1, x2, y2 = box.pixels
        corners = ((x1, y1), (x2, y1), (x2, y2), (x1, y2))
    # a corner at 1000 is one pixel past the edge, and half of a thick line would be outside
    inset = style.line // 2
    inside = [
        (min(max(x, inset), max(inset, size[0] - 1 - inset)), min(max(y, inset), max(inset, size[1] - 1 - inset)))
        for x, y in corners
    ]
    closed = [*inside, *inside[:2]]  # past the start, so that the last corner is joined too
    if style.line > 1:  # a thin dark rim keeps the line visible on a background of its own colour
        draw.line(closed, fill=BLACK, width=style.line + 2, joint="curve")
    draw.line(closed, fill=colour, width=style.line, joint="curve")


def _plate(
    draw: ImageDraw.ImageDraw, box: Box, colour: Colour, style: Style, size: tuple[int, int], taken: list[Rectangle]
) -> Rectangle:
    """Draw the label of `box` where it covers no other label, if there is such a place; return the plate."""
    text = " ".join("".join(c if c.isprintable() else " " for c in (box.label or "")[:LONGEST]).split())
    runs = _shortened(text, style.font, size[0] - 2 * style.padding)
    # one height for all labels: the reach of a hanzi, an accent and a descender
    _, top, _, bottom = find_font(style.font).getbbox("国Ég", anchor="ls")
    width = round(_length(runs)) + 2 * style.padding
    height = round(bottom - top) + 2 * style.padding
    left, upper = _place(box.pixels, (width, height), size, style.line, taken)
    plate = (left, upper, left + width, upper + height)
    draw.rectangle((left, upper, left + width - 1, upper + height - 1), fill=colour)
    across, baseline = float(left + style.padding), upper + style.padding - round(top)
    for part, font in runs:
        draw.text((across, baseline), part, font=font, fill=_ink(colour), anchor="ls")
        across += font.getlength(part)
    return plate


def _length(runs: Sequence[Run]) -> float:
    return sum(font.getlength(part) for part, font in runs)


def _shortened(text: str, size: int, room: int) -> list[Run]:
    """`text` in fonts of `size` pixels, cut with an ellipsis if it is wider than `room` pixels."""
    runs = split_runs(text, size)
    while text and _length(runs) > room:
        text = text[:-1]
        runs = split_runs(text + "…", size)
    return runs


def _place(
    box: Rectangle, plate: tuple[int, int], size: tuple[int, int], line: int, taken: list[Rectangle]
) -> tuple[int, int]:
    """Left and upper edge of a plate: above the box, below it, inside it, or further down, within the picture."""
    (x1, y1, x2, y2), (width, height) = box, plate
    edge = line // 2
    lefts = (x1 - edge, x2 - width + edge + 1)
    outside = [(left, upper) for upper in (y1 - height - edge, y2 + edge + 1) for left in lefts]
    wishes = [(left, upper) for left, upper in outside if 0 <= upper <= size[1] - height]
    lefts = (x1 + edge + 1, x2 - width - edge)
    wishes += [(left, upper) for upper in (y1 + edge + 1, y2 - height - edge) for left in lefts]
    wishes += [(x1 - edge, upper) for upper in range(max(0, y1), max(0, size[1] - height) + 1, height + 1)]
    wishes = [(_clamp(left, size[0] - width), _clamp(upper, size[1] - height)) for left, upper in wishes]
    free = (wish for wish in wishes if not any(_overlap((*wish, wish[0] + width, wish[1] + height), t) for t in taken))
    return next(free, wishes[0])


def _clamp(value: int, highest: int) -> int:
    return min(max(value, 0), max(highest, 0))


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _ink(plate: Colour) -> Colour:
    """White letters where they are readable on `plate`, else black ones (WCAG 2.1 relative luminance)."""
    linear = [(c / 255 / 12.92) if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in plate]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return WHITE if 1.05 / (luminance + 0.05) >= READABLE else BLACK
