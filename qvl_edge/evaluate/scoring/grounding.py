"""Grounding: is the first box of an answer the right one? (RefCOCO, RefCOCO+, RefCOCOg)"""

import re
from collections.abc import Sequence

Box = Sequence[float]  # x1, y1, x2, y2
RIGHT = 0.5
_FIRST = re.compile(r"\((.*?)\),\((.*?)\)")


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2 in the same unit; 0.0 if they have no area."""
    width = max(0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0, min(one[3], other[3]) - max(one[1], other[1]))
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - width * height
    return width * height / area if area > 0 else 0.0


def first_box(text: str) -> tuple[float, float, float, float] | None:
    """x1, y1, x2, y2 of the first "(x1,y1),(x2,y2)" of a text, in thousandths of the picture's sides, as written.

    As Qwen-VL's eval_mm/evaluate_grounding.py reads an answer whose prompt ends in "<box>", so that the answer has no
    such tag. Other than qvl_edge.text.boxes.parse_boxes: needs no tags, takes fractions, signs, numbers past 1000 and
    corners in any order, allows no space between the two points, and ends at the first pair of brackets, good or not.
    Where parse_boxes finds a `<box>` without spaces and nothing in brackets stands before it, both give the same.
    """
    found = _FIRST.search(text)
    if found is None:
        return None
    numbers = [point.split(",") for point in found.groups()]
    try:
        (x1, y1), (x2, y2) = ([float(number) for number in point] for point in numbers)
    except ValueError:  # not numbers, or not two
        return None
    return x1, y1, x2, y2


def grounding_iou(prediction: str, truth: Box, *, width: int, height: int) -> float:
    """IoU of a text's first box with the true one; right is RIGHT or more, as upstream counts. 0.0 without a box.

    truth: x1, y1, x2, y2 in pixels of a picture of width x height. Thousandths become pixels as upstream makes them,
    unrounded and with 999 as the far edge; the Runtime's boxes are rounded down and take 1000.
    """
    box = first_box(prediction)
    if box is None:
        return 0.0
    return iou([value / 999 * side for value, side in zip(box, (width, height) * 2, strict=True)], truth)
