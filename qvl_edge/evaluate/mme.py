"""MME: yes or no, two questions per image, in 14 subtasks.

The data is a folder, in one of the two forms that MME comes in. eval_tool/Your_Results has one file per subtask: image,
question and answer separated by tabs; the images are SUBTASK/NAME or SUBTASK/images/NAME in `--images`.
MME_Benchmark_release has one folder per subtask, and in it one file of two lines, question and answer, per image of the
same name, beside the images (existence/000000006040.txt) or separate (landmark/images, landmark/questions_answers_YN).

Upstream samples with top_p 0.01, which leaves one token to draw from wherever the likeliest has more than 1 %: greedy
decoding, as here, without the draw.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, groupby, zip_longest
from pathlib import Path
from typing import Literal

from qvl_edge.evaluate.records import Row, number_ids, read_text
from qvl_edge.evaluate.task import CHAT, Item, Metric, Prediction, QualityDataError, Task, by_item, by_unit

SUBTASKS = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split(),
}
_SUFFIXES = (".jpg", ".png", ".jpeg")
_PLACES = ("", "images", "images/toy_dataset")  # of the images in a subtask's folder


def read(folder: Path, images: Path | None) -> list[Item]:
    """An item for each question; `group` is the subtask, `unit` the image, the reference "yes" or "no"."""
    items: list[Item] = []
    for subtask in chain(*SUBTASKS.values()):
        if (folder / f"{subtask}.txt").is_file():
            rows = _rows(folder / f"{subtask}.txt", ("image", "question", "answer"))
            asked = [(row, _image(row, row.text("image"), images or folder, subtask)) for row in rows]
        elif (folder / subtask).is_dir():
            asked = [one for file in _texts(folder / subtask) for one in _two_lines(file, subtask, folder)]
        else:
            continue
        items += _items(subtask, asked)
    if not items:
        raise QualityDataError(
            f"{folder} has no subtask of MME, neither existence.txt nor existence/ or the like; --data names the "
            f"folder that holds {', '.join(chain(*SUBTASKS.values()))}"
        )
    return items


def _items(subtask: str, asked: Sequence[tuple[Row, Path]]) -> Iterator[Item]:
    units = number_ids(path.name for _, path in asked[::2])
    for unit, first, second in zip_longest(units, asked[::2], asked[1::2]):
        if second is None or second[1] != first[1]:
            raise QualityDataError(f"{first[0].where}: expected two questions on {first[1].name} in a row, found one")
        for number, (row, path) in enumerate((first, second), 1):
            answer = row.text("answer").strip().lower()
            if answer not in ("yes", "no"):
                raise row.error(["answer"], "Yes or No", answer)
            content = (path, "\n" + row.text("question").strip())
            yield Item(f"{subtask}/{unit}/{number}", content, answer, group=subtask, unit=f"{subtask}/{unit}")


def _rows(file: Path, names: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            cells = line.strip().split("\t")
            if len(cells) < len(names):
                raise QualityDataError(
                    f"{file}, line {number} has {len(cells)} cells; expected {', '.join(names)} with tabs between"
                )
            yield Row(f"{file}, line {number}", dict(zip(names, cells, strict=False)))


def _texts(folder: Path) -> list[Path]:
    apart = folder / "questions_answers_YN"
    return sorted((apart if apart.is_dir() else folder).glob("*.txt"))


def _two_lines(file: Path, subtask: str, folder: Path) -> Iterator[tuple[Row, Path]]:
    names = [file.stem + suffix for suffix in _SUFFIXES]
    name = next((name for name in names if _place(folder / subtask, name)), names[0])
    for row in _rows(file, ("question", "answer")):
        yield row, _image(row, name, folder, subtask)


def _image(row: Row, name: str, folder: Path, subtask: str) -> Path:
    return _place(folder / subtask, name) or row.image(f"{subtask}/{name}", folder)


def _place(folder: Path, name: str) -> Path | None:
    return next((path for place in _PLACES if os.path.isfile(path := folder / place / name)), None)


def read_yes_no(text: str) -> Literal["yes", "no", "other"]:
    """What an answer says: its first four characters contain "yes" or, failing that, "no", in any case.

    As MME's eval_tool (arXiv:2306.13394): leading white space is not removed, and "None" or "Not sure" are "no".
    lmms-eval differs: it removes white space and full stops first, and takes "y" and "n".
    """
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score(items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[Metric]:
    """Accuracy over questions; accuracy+ over images, both of whose questions must be answered correctly."""
    right = {item.id: float(read_yes_no(predictions[item.id].text) == item.reference) for item in items}
    pairs = [list(pair) for _, pair in groupby(items, lambda item: item.unit)]
    both = [min(right[item.id] for item in pair) for pair in pairs]
    return [by_item("accuracy", items, list(right.values())), by_unit("accuracy+", pairs, both)]


def totals(metrics: Sequence[Metric]) -> dict[str, float]:
    """Accuracy + accuracy+ of each subtask, at most 200, and their sums: MME's scores for perception and cognition."""
    scores: dict[str, float] = {}
    for metric in metrics:
        for subtask in dict.fromkeys(metric.groups):
            values = [value for value, group in zip(metric.values, metric.groups, strict=True) if group == subtask]
            scores[subtask] = scores.get(subtask, 0.0) + metric.scale * sum(values) / len(values)
    sums = {}
    for kind, names in SUBTASKS.items():
        found = [name for name in names if name in scores]
        if found:
            part = "" if len(found) == len(names) else f" ({len(found)} of {len(names)} subtasks)"
            sums[kind + part] = sum(scores[name] for name in found)
    return {**sums, **scores}


MME = Task(
    "mme",
    "MME",
    read,
    score,
    source="Qwen-VL eval_mm/mme/eval.py, MME eval_tool/calculation.py",
    chat_format="chatml",
    generation=CHAT,
    totals=totals,
)
