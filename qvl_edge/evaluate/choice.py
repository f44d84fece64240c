"""Multiple choice by likelihood: ScienceQA, SEED-Bench, and MMBench with circular evaluation (docs/quality.md).

The options are written into the prompt and " A", " B" … are scored as its continuation, each one token; the likeliest
is the answer. SEED-Bench is read as SEED-Bench.json, of which the questions about images (types 1 to 9) are taken, or
as upstream's trans.py leaves it: a whole `prompt`, which marks the images as <img>NAME</img>.

MMBench's options are asked for in every rotation, and a question counts if all are answered correctly. The 2023 file
holds the rotations, under index + 1000000, 2000000 and 3000000; for a file that does not, they are made here.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from string import ascii_uppercase

from qvl_edge.evaluate.records import Row, ids_of, read_rows, save_images
from qvl_edge.evaluate.task import Item, Metric, Prediction, QualityDataError, Task, by_item, by_unit

_SEED_OPTIONS = 4
_TYPE, _IMAGE_TYPES = "question_type_id", 9  # types 10 to 12 are about videos
_IMG = re.compile(r"<img>(.*?)</img>")
_ROTATION = 1_000_000  # what MMBench adds to a question's index for each rotation of its options


def _continuations(count: int) -> tuple[str, ...]:
    """What is scored after a prompt with `count` options: " A", " B" …"""
    return tuple(f" {letter}" for letter in ascii_uppercase[:count])


def _written(choices: Sequence[str]) -> str:
    """The options as the prompts have them, one per line."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))


def _prompt(hint: str, question: str, choices: Sequence[str]) -> str:
    """What follows the image in ScienceQA's and MMBench's prompts."""
    return f"Context: {hint or 'N/A'}\nQuestion: {question}\nOptions: {_written(choices)}\nAnswer:"


def _answer_index(row: Row, count: int) -> int:
    """The index of the letter in the field "answer"."""
    answer = row.text("answer").strip()
    if answer not in tuple(ascii_uppercase[:count]):
        raise row.error(["answer"], f"one of {', '.join(ascii_uppercase[:count])}", answer)
    return ascii_uppercase.index(answer)


def read_scienceqa(file: Path, images: Path | None) -> list[Item]:
    """An item for each question; its reference is the index of the correct option."""
    rows = read_rows(file)
    items = []
    for row, identity in zip(rows, ids_of(rows, "question_id"), strict=True):
        choices = row.texts("choices")
        answer = row.integer("answer")
        if not 2 <= len(choices) <= len(ascii_uppercase):
            raise row.error(["choices"], "2 to 26 options", choices)
        if not 0 <= answer < len(choices):
            raise row.error(["answer"], f"an index below {len(choices)}, the number of choices", answer)
        path = row.image(row.text("image"), images or file.parent)
        text = _prompt(row.get("hint"), row.text("question"), choices)
        items.append(Item(identity, (path, text), answer, _continuations(len(choices))))
    return items


def read_seed_bench(file: Path, images: Path | None) -> list[Item]:
    """An item for each question; always the letters A to D, as upstream scores them."""
    folder, items = images or file.parent, []
    rows = [row for row in read_rows(file) if not row.has(_TYPE) or row.integer(_TYPE) <= _IMAGE_TYPES]
    for row, identity in zip(rows, ids_of(rows, "question_id"), strict=True):
        if row.has("prompt"):
            content = _marked_content(row, folder)
        else:
            choices = [row.text(f"choice_{letter}") for letter in "abcd"]
            text = f"\nQuestion: {row.text('question')}\nOptions: {_written(choices)}\nAnswer:"
            content = (row.image(row.text("data_id"), folder), text)
        answer = _answer_index(row, _SEED_OPTIONS)
        group = str(row.get(_TYPE, default=""))
        items.append(Item(identity, content, answer, _continuations(_SEED_OPTIONS), group=group))
    return items


def _marked_content(row: Row, folder: Path) -> tuple[str | Path, ...]:
    """The texts and images of a prompt in which the file marks the images."""
    text = row.text("prompt")
    parts = _IMG.split(text)  # every second one is the name of an image
    if len(parts) == 1:
        raise row.error(["prompt"], "an image as <img>NAME</img>", text)
    return tuple(row.image(part, folder) if place % 2 else part for place, part in enumerate(parts) if part)


def score(items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[Metric]:
    """The share of correct answers."""
    return [by_item("accuracy", items, [float(predictions[item.id].choice == item.reference) for item in items])]


@dataclass(frozen=True)
class _Question:
    """A row of MMBench."""

    row: Row
    index: int
    choices: tuple[str, ...]
    answer: int

    @classmethod
    def of(cls, row: Row) -> "_Question":
        letters = [letter for letter in "ABCD" if row.has(letter)]
        if len(letters) < 2 or letters != list("ABCD"[: len(letters)]):
            raise QualityDataError(f"{row.where}: expected options A, B … without a gap, found {letters or 'none'}")
        index = row.integer("index")
        if index < 0:
            raise row.error(["index"], "a whole number from 0 on", index)
        return cls(row, index, tuple(row.text(letter) for letter in letters), _answer_index(row, len(letters)))

    def rotated(self, shift: int) -> "_Question":
        """Option number `shift` comes first, as in MMBench's rows."""
        choices = self.choices[shift:] + self.choices[:shift]
        answer = (self.answer - shift) % len(choices)
        return replace(self, index=self.index + shift * _ROTATION, choices=choices, answer=answer)

    def item(self, image: Path) -> Item:
        text = _prompt(self.row.get("hint", default=""), self.row.text("question"), self.choices)
        return Item(
            str(self.index),
            (image, text),
            {"answer": self.answer, "choices": list(self.choices)},
            _continuations(len(self.choices)),
            group=self.row.get("category", default=""),
            unit=str(self.index % _ROTATION),
        )


def read_mmbench(file: Path, images: Path | None) -> list[Item]:
    """An item for each rotation of a question; `unit` is the question's index, the reference has the options' texts.

    QualityDataError also where two rows have the same index: they would count as rotations of one question.
    """
    questions = [_Question.of(row) for row in read_rows(file)]
    by_index: dict[str, _Question] = {}
    for one in questions:
        first = by_index.setdefault(str(one.index), one)
        if first is not one:
            raise QualityDataError(f"{one.row.where} has index {one.index}, and so has {first.row.where}")
    if all(one.index < _ROTATION for one in questions):
        questions = [one.rotated(shift) for one in questions for shift in range(len(one.choices))]
    # a question's rotations in a row: they share an image, and the question as published comes first
    questions.sort(key=lambda one: (one.index % _ROTATION, one.index))
    # a cell may hold, instead of an image, the index of the row that has it
    rows = [by_index.get(one.row.text("image"), one).row for one in questions]
    paths = save_images(file, images, [(row, row.text("image")) for row in rows])
    return [one.item(path) for one, path in zip(questions, paths, strict=True)]


def score_mmbench(items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[Metric]:
    """Circular: every rotation correct. Vote: the option that most rotations chose, a tie counting as its share, which
    is the mean of upstream's random draw. Vanilla: the question as published."""
    units = [list(rotations) for _, rotations in groupby(items, lambda item: item.unit)]
    circular, vote, vanilla = [], [], []
    for rotations in units:
        choices = [predictions[item.id].choice for item in rotations]
        right = [choice == item.reference["answer"] for choice, item in zip(choices, rotations, strict=True)]
        votes = Counter(item.reference["choices"][choice] for choice, item in zip(choices, rotations, strict=True))
        most = [text for text, count in votes.items() if count == max(votes.values())]
        answer = rotations[0].reference["choices"][rotations[0].reference["answer"]]
        circular.append(float(all(right)))
        vote.append((answer in most) / len(most))
        vanilla.append(float(right[0]))
    values = {"circular accuracy": circular, "vote accuracy": vote, "vanilla accuracy": vanilla}
    return [by_unit(name, units, value) for name, value in values.items()]


CHOICE = (
    Task(
        "scienceqa",
        "ScienceQA (test, with image)",
        read_scienceqa,
        score,
        "Qwen-VL eval_mm/evaluate_multiple_choice.py",
    ),
    Task("seed_bench", "SEED-Bench", read_seed_bench, score, "Qwen-VL eval_mm/seed_bench/eval.py"),
    Task("mmbench", "MMBench (dev)", read_mmbench, score_mmbench, "Qwen-VL eval_mm/mmbench"),
)
