"""Referring expressions: RefCOCO, RefCOCO+, RefCOCOg and GRIT, correct where the first box overlaps the true one half.

RefCOCO's files are upstream's .jsonl; GRIT's is refexp.json of a split with the true boxes added as `bboxes`, which
GRIT does not publish, or the examples file of its repository. docs/quality.md has an example of each.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from qvl_edge.errors import ImageError
from qvl_edge.evaluate.records import Row, ids_of, read_json, read_rows, records_of
from qvl_edge.evaluate.task import Item, Metric, Prediction, QualityDataError, Task, by_item
from qvl_edge.text.boxes import iou
from qvl_edge.vision.image import load_frame

Box = Sequence[float]  # x1, y1, x2, y2
MIN_IOU = 0.5  # of a correct box
_BOX = re.compile(r"\((.*?)\),\((.*?)\)")


def first_box(text: str) -> tuple[float, float, float, float] | None:
    """x1, y1, x2, y2 of the first "(x1,y1),(x2,y2)" of a text, in thousandths of the image's sides, as written.

    As Qwen-VL's eval_mm/evaluate_grounding.py reads an answer whose prompt ends in "<box>", so that the answer has no
    such tag. Unlike qvl_edge.text.boxes.parse_boxes it needs no tags, takes fractions, signs, numbers past 1000 and
    corners in any order, allows no space between the two points, and ends at the first pair of brackets, valid or not.
    Where parse_boxes finds a `<box>` without spaces and nothing in brackets stands before it, both agree.
    """
    found = _BOX.search(text)
    if found is None:
        return None
    numbers = [point.split(",") for point in found.groups()]
    try:
        (x1, y1), (x2, y2) = ([float(number) for number in point] for point in numbers)
    except ValueError:  # not numbers, or not two
        return None
    return x1, y1, x2, y2


def grounding_iou(prediction: str, truth: Box, *, width: int, height: int) -> float:
    """IoU of a text's first box with the true one; 0.0 without a box.

    truth: x1, y1, x2, y2 in pixels of an image of width x height. Thousandths become pixels as upstream converts them,
    unrounded and with 999 as the far edge; the Runtime's boxes are rounded down and take 1000.
    """
    box = first_box(prediction)
    if box is None:
        return 0.0
    return iou([value / 999 * side for value, side in zip(box, (width, height) * 2, strict=True)], truth)


def _item(identity: str, path: Path, expression: str, box: Sequence[float], size: tuple[int, int]) -> Item:
    """The prompt ends inside the markup that the model continues; the reference is in pixels."""
    content = (path, f"<ref>{expression}</ref><box>")
    return Item(identity, content, {"box": list(box), "size": list(size)})


def read_refcoco(file: Path, images: Path | None) -> list[Item]:
    """An item for each expression."""
    rows = read_rows(file)
    return [
        _item(
            identity,
            row.image(row.text("image"), images or file.parent),
            row.text("sent"),
            row.box("bbox"),
            (row.pixels("width"), row.pixels("height")),
        )
        for row, identity in zip(rows, ids_of(rows, "id", "question_id"), strict=True)
    ]


def read_grit(file: Path, images: Path | None) -> list[Item]:
    """An item for each expression; the size is that of the image as it is shown, which the model sees."""
    rows = [_flat(row) for row in records_of(file, read_json(file), "refexp")]
    items = []
    for row, identity in zip(rows, ids_of(rows, "example_id"), strict=True):
        if not row.has("bboxes"):
            raise QualityDataError(
                f"{row.where} has no 'bboxes', the true box; GRIT publishes none of its splits: score there or add them"
            )
        path = row.image(row.text("image_id", "image_path"), images or file.parent)
        try:
            frame = load_frame(path)
        except ImageError as error:
            raise QualityDataError(f"{row.where}: {error}") from None
        items.append(_item(identity, path, row.text("task_query"), row.box("bboxes"), frame.size))
    return items


def _flat(row: Row) -> Row:
    """The examples file separates what is given from what is asked for."""
    if isinstance(row.get("input", default=None), dict) and isinstance(row.get("gt", default=None), dict):
        return Row(row.where, {**row.values["gt"], **row.values["input"]})
    return row


def _score(items: Sequence[Item], predictions: Mapping[str, Prediction], *, at_half: bool) -> list[Metric]:
    overlaps = []
    for item in items:
        (width, height), box = item.reference["size"], item.reference["box"]
        overlaps.append(grounding_iou(predictions[item.id].text, box, width=width, height=height))
    right = [float(value > MIN_IOU or at_half and value == MIN_IOU) for value in overlaps]
    return [by_item("accuracy, IoU 0.5", items, right), by_item("IoU", items, overlaps)]


def _task(name: str, title: str, read: Callable, source: str, *, at_half: bool) -> Task:
    # as upstream: at least 10 tokens, so that a box is finished, and 28, which is enough for one
    return Task(
        name,
        title,
        read,
        partial(_score, at_half=at_half),  # whether an IoU of exactly 0.5 is correct
        source,
        generation={"do_sample": False, "min_new_tokens": 10, "max_new_tokens": 28},
    )


_UPSTREAM = "Qwen-VL eval_mm/evaluate_grounding.py"
GROUNDING = (
    _task("refcoco", "RefCOCO", read_refcoco, _UPSTREAM, at_half=True),
    _task("refcoco+", "RefCOCO+", read_refcoco, _UPSTREAM, at_half=True),
    _task("refcocog", "RefCOCOg", read_refcoco, _UPSTREAM, at_half=True),
    _task("grit", "GRIT (refexp)", read_grit, "GRIT metrics/refexp.py", at_half=False),
)
