"""Boxes in the model's text: `<ref>label</ref><box>(x1,y1),(x2,y2)</box>` -> pixels of the original picture."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GRID = 1000  # the model writes coordinates in [0, 1000), whatever the picture's size (Qwen-VL README: "normalized")

_POINT = r"\(\s*([0-9]{1,6})\s*,\s*([0-9]{1,6})\s*\)"
_POINTS = {count: re.compile(r"\s*" + r"\s*,\s*".join([_POINT] * count) + r"\s*") for count in (2, 4)}
# A label or a body ends at the next tag, so an unclosed one takes nothing but itself along.
_MARKUP = re.compile(
    r"<ref>(?P<ref>(?:(?!</?(?:ref|box|quad)>).)*)</ref>|<box>(?P<box>[^<]*)</box>|<quad>(?P<quad>[^<]*)</quad>",
    re.DOTALL,
)
_UNFINISHED = re.compile(r"<(?:box|quad)>[^<]*(?:</?[a-z]*)?$|</?[a-z]*$")  # at the end of an answer that grows


@dataclass(frozen=True)
class Box:
    """A place in a picture that the model named. A `<quad>` has its four points and the rectangle around them."""

    label: str | None
    corners: tuple[int, int, int, int]  # x1, y1, x2, y2 in thousandths of the picture's sides, as written
    pixels: tuple[int, int, int, int]  # the same in pixels of the original picture
    image: int  # which of the prompt's pictures, counted from 0
    quad: tuple[tuple[int, int], ...] | None = None  # four points in thousandths, in the order written
    quad_pixels: tuple[tuple[int, int], ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the quad's keys only where it has one."""
        plain: dict[str, Any] = {
            "label": self.label,
            "corners": list(self.corners),
            "pixels": list(self.pixels),
            "image": self.image,
        }
        if self.quad is not None and self.quad_pixels is not None:
            plain["quad"] = [list(point) for point in self.quad]
            plain["quad_pixels"] = [list(point) for point in self.quad_pixels]
        return plain


def read_points(body: str, count: int) -> tuple[tuple[int, int], ...] | None:
    """The `count` (2 or 4) points of "(x1,y1),(x2,y2)…", spaces allowed; None for anything else."""
    found = _POINTS[count].fullmatch(body)
    if found is None:
        return None
    numbers = [int(number) for number in found.groups()]
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def parse_boxes(text: str, *, image_sizes: Sequence[tuple[int, int]]) -> list[Box]:
    """The boxes and quads of `text`, in its order.

    image_sizes: (width, height) in pixels of the prompt's pictures; without any picture there are no boxes. The boxes
    belong to the latest picture, as upstream draws them.

    A `<ref>` directly before a box labels it and the boxes that follow directly (upstream labels the first one only).
    What is malformed is skipped, where upstream raises: a wrong count of numbers, letters, numbers past 1000, a second
    corner left of or above the first, a tag left open.
    """
    if not image_sizes:
        return []
    index = len(image_sizes) - 1
    boxes = []
    label, label_end = None, -1
    for match in _MARKUP.finditer(text):
        if match["ref"] is not None:
            label, label_end = match["ref"].strip() or None, match.end()
            continue
        if match.start() != label_end:
            label = None
        label_end = match.end()
        if match["box"] is not None:
            box = _rectangle(label, match["box"], image_sizes[index], index)
        else:
            box = _quad(label, match["quad"], image_sizes[index], index)
        if box is not None:
            boxes.append(box)
    return boxes


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2 in the same unit; 0.0 if they have no area."""
    width = max(0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0, min(one[3], other[3]) - max(one[1], other[1]))
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - width * height
    return width * height / area if area > 0 else 0.0


def plain_text(text: str) -> str:
    """`text` without its markup: phrases stay, boxes and quads go, and so does a mark that is not complete yet."""
    text = _UNFINISHED.sub("", _MARKUP.sub(lambda found: found["ref"] or "", text))
    return re.sub(r"</?(?:ref|box|quad)>", "", text)


def _rectangle(label: str | None, body: str, size: tuple[int, int], image: int) -> Box | None:
    points = read_points(body, 2)
    if points is None or not _inside(points):
        return None
    (x1, y1), (x2, y2) = points
    if x2 < x1 or y2 < y1:
        return None
    (left, top), (right, bottom) = _to_pixels(points, size)
    return Box(label, (x1, y1, x2, y2), (left, top, right, bottom), image)


def _quad(label: str | None, body: str, size: tuple[int, int], image: int) -> Box | None:
    points = read_points(body, 4)
    if points is None or not _inside(points):
        return None
    pixels = _to_pixels(points, size)
    return Box(label, _around(points), _around(pixels), image, points, pixels)


def _inside(points: tuple[tuple[int, int], ...]) -> bool:
    return all(0 <= x <= GRID and 0 <= y <= GRID for x, y in points)  # 1000 itself is seen in answers: the far edge


def _to_pixels(points: tuple[tuple[int, int], ...], size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    width, height = size
    # upstream's order of operations (tokenization_qwen.py: draw_bbox_on_latest_picture), so the rounding is the same
    return tuple((int(x / GRID * width), int(y / GRID * height)) for x, y in points)


def _around(points: tuple[tuple[int, int], ...]) -> tuple[int, int, int, int]:
    across, down = [x for x, _ in points], [y for _, y in points]
    return min(across), min(down), max(across), max(down)
