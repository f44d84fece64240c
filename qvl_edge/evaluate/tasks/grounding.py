"""Referring expressions: RefCOCO, RefCOCO+, RefCOCOg and GRIT, right where the first box overlaps the true one by half.

RefCOCO's files are refcoco_val.jsonl, refcoco+_testA.jsonl, refcocog_test.jsonl and the like, the box in pixels:

    {"image": "data/coco/train2014/COCO_train2014_000000581857.jpg", "sent": "the lady", "bbox": [103.9, 299.9, 238.1, 477.4], "width": 640, "height": 480}
    {"image": "data/coco/train2014/COCO_train2014_000000581563.jpg", "sent": "red cup", "bbox": [10, 20, 110, 220], "width": 640, "height": 427}

GRIT's is refexp.json of a split, with the true boxes as `bboxes`, or the examples file that its repository publishes.
GRIT keeps the true boxes of its two splits to itself; without them only its own server can score.

    [{"example_id": "refexp_0", "image_id": "coco/0001.jpg", "task_name": "refexp", "task_query": "the tv", "bboxes": [[206, 134, 442, 279]]}]
    {"refexp": [{"input": {"image_path": "examples/images/refexp_1.png", "task_query": "tv"}, "gt": {"bboxes": [[206, 134, 442, 279]]}}]}
"""  # noqa: E501

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from qvl_edge.evaluate.item import Item, Prediction
from qvl_edge.evaluate.scoring.grounding import RIGHT, grounding_iou
from qvl_edge.evaluate.task import Metric, QualityDataError, Task, by_item
from qvl_edge.evaluate.tasks.reading import Row, ids_of, read_json, read_rows, records_of


def item(identity: str, path: Path, expression: str, box: Sequence[float], size: tuple[int, int]) -> Item:
    """The prompt ends inside the markup that the model goes on with; the reference is in pixels."""
    content = (path, f"<ref>{expression}</ref><box>")
    return Item(identity, content, {"box": list(box), "size": list(size)})


def read_refcoco(file: Path, images: Path | None) -> list[Item]:
    """An item an expression."""
    rows = read_rows(file)
    return [
        item(
            identity,
            row.image(row.text("image"), images or file.parent),
            row.text("sent"),
            row.box("bbox"),
            (row.pixels("width"), row.pixels("height")),
        )
        for row, identity in zip(rows, ids_of(rows, "id", "question_id"), strict=True)
    ]


def read_grit(file: Path, images: Path | None) -> list[Item]:
    """An item an expression; the size is the image file's."""
    rows = [_flat(row) for row in records_of(file, read_json(file), "refexp")]
    items = []
    for row, identity in zip(rows, ids_of(rows, "example_id"), strict=True):
        if not row.has("bboxes"):
            raise QualityDataError(
                f"{row.where} has no 'bboxes', the true box; GRIT publishes none of its splits: score there or add them"
            )
        path = row.image(row.text("image_id", "image_path"), images or file.parent)
        try:
            with Image.open(path) as image:
                size = image.size
        except (OSError, Image.DecompressionBombError) as error:
            raise QualityDataError(f"{row.where}: {path} is no image that can be read: {error}") from None
        items.append(item(identity, path, row.text("task_query"), row.box("bboxes"), size))
    return items


def _flat(row: Row) -> Row:
    """The examples file keeps what is given and what is asked for apart."""
    if isinstance(row.get("input", default=None), dict) and isinstance(row.get("gt", default=None), dict):
        return Row(row.where, {**row.values["gt"], **row.values["input"]})
    return row


def _score(items: Sequence[Item], predictions: Mapping[str, Prediction], *, at_half: bool) -> list[Metric]:
    overlaps = []
    for one in items:
        (width, height), box = one.reference["size"], one.reference["box"]
        overlaps.append(grounding_iou(predictions[one.id].text, box, width=width, height=height))
    right = [float(value > RIGHT or at_half and value == RIGHT) for value in overlaps]
    return [by_item("accuracy, IoU 0.5", items, right), by_item("IoU", items, overlaps)]


def _task(name: str, title: str, read: Callable, source: str, *, at_half: bool) -> Task:
    # as upstream: at least 10 tokens, so that a box is finished, and 28, which is enough for one
    return Task(
        name,
        title,
        read,
        partial(_score, at_half=at_half),  # whether an IoU of exactly 0.5 is right
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
