"""MMBench: multiple choice by likelihood, with circular evaluation.

The file is mmbench_dev_20230712.tsv or a later one, with the image in base64:

    index	question	hint	A	B	C	D	answer	category	image
    241	Which is right?		one	two			B	logic	/9j/4AAQ…

The options are asked for in every rotation, and a question counts if all are answered right. The 2023 file holds the
rotations, under index + 1000000, 2000000 and 3000000; for a file that does not, they are made here.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from qvl_edge.evaluate.item import Item, Prediction
from qvl_edge.evaluate.task import Metric, QualityDataError, Task
from qvl_edge.evaluate.tasks.multiple_choice import answer_index, continuations, prompt
from qvl_edge.evaluate.tasks.reading import Row, read_rows, save_images

_ROTATION = 1_000_000  # what MMBench adds to a question's index for each rotation of its options


@dataclass(frozen=True)
class Question:
    """A row of MMBench."""

    row: Row
    index: int
    question: str
    hint: str
    choices: tuple[str, ...]
    answer: int
    category: str
    image: str  # base64, or the index of the row that has it

    @classmethod
    def of(cls, row: Row) -> "Question":
        letters = [letter for letter in "ABCD" if row.has(letter)]
        if len(letters) < 2 or letters != list("ABCD"[: len(letters)]):
            raise QualityDataError(f"{row.where}: expected options A, B … without a gap, found {letters or 'none'}")
        index = row.integer("index")
        if index < 0:
            raise row.error(["index"], "a whole number from 0 on", index)
        return cls(
            row,
            index,
            row.text("question"),
            row.get("hint", default=""),
            tuple(row.text(letter) for letter in letters),
            answer_index(row, len(letters)),
            row.get("category", default=""),
            row.text("image"),
        )

    def rotated(self, shift: int) -> "Question":
        """Option number `shift` comes first, as in MMBench's rows."""
        count = len(self.choices)
        choices = tuple(self.choices[(place + shift) % count] for place in range(count))
        index, answer = self.index + shift * _ROTATION, (self.answer - shift) % count
        return Question(self.row, index, self.question, self.hint, choices, answer, self.category, self.image)


def read(file: Path, images: Path | None) -> list[Item]:
    """An item a rotation of a question; `unit` is the question's index, the reference also has the options' texts.

    QualityDataError also where two rows have one index: they would count as rotations of one question.
    """
    questions = [Question.of(row) for row in read_rows(file)]
    by_index: dict[str, Question] = {}
    for one in questions:
        first = by_index.setdefault(str(one.index), one)
        if first is not one:
            raise QualityDataError(f"{one.row.where} has index {one.index}, and so has {first.row.where}")
    if all(one.index < _ROTATION for one in questions):
        questions = [one.rotated(shift) for one in questions for shift in range(len(one.choices))]
    # a question's rotations in a row: they share an image, and the question as it stands comes first
    questions.sort(key=lambda one: (one.index % _ROTATION, one.index))
    # a cell may name the row whose image is meant
    cells = [by_index.get(one.image, one) for one in questions]
    paths = save_images(file, images, [(one.row, one.image) for one in cells])
    items = []
    for one, path in zip(questions, paths, strict=True):
        content = (path, prompt(one.hint, one.question, one.choices))
        reference = {"answer": one.answer, "choices": list(one.choices)}
        unit = str(one.index % _ROTATION)
        options = continuations(len(one.choices))
        items.append(Item(str(one.index), content, reference, options, group=one.category, unit=unit))
    return items


def score(items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[Metric]:
    """Circular: every rotation right. Vote: the option that most rotations chose, a tie counting as its share, which is
    what upstream's draw gives on average. Vanilla: the question as it stands."""
    units = [list(rotations) for _, rotations in groupby(items, lambda item: item.unit)]
    all_right, vote, vanilla = [], [], []
    for rotations in units:
        choices = [predictions[item.id].choice for item in rotations]
        right = [choice == item.reference["answer"] for choice, item in zip(choices, rotations, strict=True)]
        votes = Counter(item.reference["choices"][choice] for choice, item in zip(choices, rotations, strict=True))
        most = [text for text, count in votes.items() if count == max(votes.values())]
        answer = rotations[0].reference["choices"][rotations[0].reference["answer"]]
        all_right.append(float(all(right)))
        vote.append((answer in most) / len(most))
        vanilla.append(float(right[0]))
    names = [rotations[0].unit for rotations in units]
    ids = [[item.id for item in rotations] for rotations in units]
    groups = [rotations[0].group for rotations in units]
    values = {"circular accuracy": all_right, "vote accuracy": vote, "vanilla accuracy": vanilla}
    return [Metric(name, value, names, ids, groups if any(groups) else ()) for name, value in values.items()]


MMBENCH = Task("mmbench", "MMBench (dev)", read, score, source="Qwen-VL eval_mm/mmbench")
