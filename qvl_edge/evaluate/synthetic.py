"""The synthetic suite: questions about scenes that the package draws, with exact answers.

`write_scenes` makes PNG files and scenes.jsonl, one question a line:

    {"question_id": "0-find", "images": ["0.png"], "kind": "find", "language": "en", "question": "Find the red circle.",
     "answer": "<ref>red circle</ref><box>(125,62),(437,375)</box>", "box": [125, 62, 437, 375]}
    {"question_id": "0-count", "images": ["0.png"], "kind": "count", "language": "zh", "question": "有几个图形？",
     "answer": "3个", "box": null}

A "find" is correct where the answer's first box has IoU > 0.5 with the exact one, every other kind where it matches to
the letter.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qvl_edge.demo.scenes import KINDS, UNSEEN, ask, ask_which, make_scene
from qvl_edge.evaluate.grounding import MIN_IOU, first_box, iou
from qvl_edge.evaluate.records import read_rows
from qvl_edge.evaluate.task import Item, Metric, Prediction, Task, by_item
from qvl_edge.files import write_jsonl

FILE = "scenes.jsonl"
TEST_SCENES = UNSEEN + 10**6  # first seed: neither trained on nor, as scenes from UNSEEN on, calibrated with
ALWAYS = ("find", "count", "read")  # asked about every scene that allows it, the other kinds about every third


def write_scenes(folder: Path, count: int) -> Path:
    """Write the data set of `count` scenes, half of the questions in Chinese; the path of its scenes.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for index in range(count):
        rng = np.random.default_rng(TEST_SCENES + index)
        scene = make_scene(TEST_SCENES + index)
        scene.image.save(folder / f"{index}.png", compress_level=1)  # no level makes the noise smaller
        for number, kind in enumerate(KINDS):
            if index % 3 and kind not in ALWAYS:
                continue
            language = ("en", "zh")[(index + number) % 2]
            names = [f"{index}.png"]
            if kind == "which":
                other = make_scene(TEST_SCENES + count + index)
                names.append(f"{index}-other.png")
                other.image.save(folder / names[-1], compress_level=1)
                question = ask_which((scene, other), language, rng)
            else:
                question = ask(scene, kind, language, rng)
            if question is not None:
                line = {"question_id": f"{index}-{kind}", "images": names, "kind": kind, "language": language}
                box = question.target.box if kind == "find" and question.target is not None else None
                lines.append({**line, "question": question.text, "answer": question.answer, "box": box})
    write_jsonl(folder / FILE, lines)  # last: where it exists, all pictures do
    return folder / FILE


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


def score(items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[Metric]:
    """The share of correct answers, by kind; and the mean IoU of "find"."""
    right: list[float] = []
    found: list[Item] = []
    overlaps: list[float] = []
    for item in items:
        text, exact = predictions[item.id].text, item.reference["box"]
        if exact is None:
            right.append(float(text == item.reference["answer"]))
            continue
        box = first_box(text)
        found.append(item)
        overlaps.append(0.0 if box is None else iou(box, exact))
        right.append(float(overlaps[-1] > MIN_IOU))
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
