"""The synthetic suite: questions about scenes that the package draws, with exact answers.

qvl_edge.evaluate.scenes writes its file. A "find" is right where the answer's first box has IoU > 0.5 with the exact
one, everything else where it is exact to the letter.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from qvl_edge.evaluate.item import Item, Prediction
from qvl_edge.evaluate.scoring.grounding import first_box, iou
from qvl_edge.evaluate.task import Metric, Task, by_item
from qvl_edge.evaluate.tasks.reading import read_rows


def read(file: Path, images: Path | None) -> list[Item]:
    """The items of a scenes.jsonl."""
    items = []
    for row in read_rows(file):
        content: list[str | Path] = []
        for index, name in enumerate(row.texts("images"), 1):
            content += [f"Picture {index}:", row.image(name, images or file.parent), "\n"]
        content.append(row.text("question"))
        kind = row.text("kind")
        reference = {"kind": kind, "answer": row.text("answer"), "box": row.get("box")}
        items.append(Item(row.text("question_id"), tuple(content), reference, group=kind))
    return items


def is_right(reference: Mapping, text: str) -> bool:
    """IoU > 0.5 of the first box for "find", the exact text otherwise."""
    if reference["box"] is None:
        return text == reference["answer"]
    return overlap(reference, text) > 0.5


def overlap(reference: Mapping, text: str) -> float:
    """IoU of the first box of `text` with the exact one, on the model's scale; 0 without a box."""
    box = first_box(text)
    return 0.0 if box is None else iou(box, tuple(reference["box"]))


def score(items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[Metric]:
    """Right answers, by kind; and the mean IoU of those that were to find something."""
    right = [float(is_right(item.reference, predictions[item.id].text)) for item in items]
    found = [item for item in items if item.reference["box"] is not None]
    overlaps = [overlap(item.reference, predictions[item.id].text) for item in found]
    metrics = [by_item("right", items, right)]
    return [*metrics, by_item("IoU", found, overlaps)] if found else metrics


SYNTHETIC = Task(
    "synthetic",
    "Synthetic scenes",
    read,
    score,
    source="qvl_edge.demo.scenes",
    chat_format="chatml",
    generation={"do_sample": False, "max_new_tokens": 160},  # the longest description has about 150 tokens
)
