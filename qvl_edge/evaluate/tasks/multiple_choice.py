"""Multiple choice by likelihood: ScienceQA and SEED-Bench; MMBench stands in a file of its own.

The options are written into the prompt and " A", " B" … are scored as its continuation, each one token; the likeliest
is the answer. ScienceQA's file is scienceqa_test_img.jsonl, `answer` counting from 0:

    {"image": "data/scienceqa/images/test/5/image.png", "hint": "", "question": "Which is a metal?", "choices": ["wood", "iron"], "answer": 1}
    {"image": "data/scienceqa/images/test/11/image.png", "hint": "A map.", "question": "What is west?", "choices": ["a", "b", "c"], "answer": 0}

SEED-Bench's is image_input.jsonl or video_input_4.jsonl of upstream's trans.py, or SEED-Bench.json itself, of which the
questions about images (types 1 to 9) are taken:

    {"question_id": "101669", "prompt": "<img>seed_bench_image/1.jpg</img>\\nQuestion: Where?\\nOptions: A. …\\nAnswer:", "answer": "A"}
    {"questions": [{"question_id": "101669", "question_type_id": 1, "data_id": "1.jpg", "question": "Where?", "choice_a": "…", …}]}
"""  # noqa: E501

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase

from qvl_edge.evaluate.item import Item, Prediction
from qvl_edge.evaluate.task import Metric, Task, by_item
from qvl_edge.evaluate.tasks.reading import Row, ids_of, read_rows

_SEED_OPTIONS = 4
_TYPE, _IMAGE_TYPES = "question_type_id", 9  # types 10 to 12 are about videos
_IMG = re.compile(r"<img>(.*?)</img>")


def continuations(count: int) -> tuple[str, ...]:
    """What is scored after a prompt with so many options: " A", " B" …"""
    return tuple(f" {letter}" for letter in ascii_uppercase[:count])


def written(choices: Sequence[str]) -> str:
    """The options as the prompts have them, a line each."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))


def prompt(hint: str, question: str, choices: Sequence[str]) -> str:
    """What follows the image in ScienceQA's and MMBench's prompts."""
    return f"Context: {hint or 'N/A'}\nQuestion: {question}\nOptions: {written(choices)}\nAnswer:"


def read_scienceqa(file: Path, images: Path | None) -> list[Item]:
    """An item a question; its reference is the index of the right option."""
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
        text = prompt(row.get("hint"), row.text("question"), choices)
        items.append(Item(identity, (path, text), answer, continuations(len(choices))))
    return items


def read_seed_bench(file: Path, images: Path | None) -> list[Item]:
    """An item a question; always the letters A to D, as upstream scores them."""
    folder, items = images or file.parent, []
    rows = [row for row in read_rows(file) if not row.has(_TYPE) or row.integer(_TYPE) <= _IMAGE_TYPES]
    for row, identity in zip(rows, ids_of(rows, "question_id"), strict=True):
        if row.has("prompt"):
            content = _content(row, folder)
        else:
            choices = [row.text(f"choice_{letter}") for letter in "abcd"]
            text = f"\nQuestion: {row.text('question')}\nOptions: {written(choices)}\nAnswer:"
            content = (row.image(row.text("data_id"), folder), text)
        answer = answer_index(row, _SEED_OPTIONS)
        group = str(row.get(_TYPE, default=""))
        items.append(Item(identity, content, answer, continuations(_SEED_OPTIONS), group=group))
    return items


def answer_index(row: Row, count: int) -> int:
    """The index of the letter in the field "answer"."""
    answer = row.text("answer").strip()
    if answer not in tuple(ascii_uppercase[:count]):
        raise row.error(["answer"], f"one of {', '.join(ascii_uppercase[:count])}", answer)
    return ascii_uppercase.index(answer)


def _content(row: Row, folder: Path) -> tuple[str | Path, ...]:
    """The texts and images of a prompt in which the file's writer marked the images."""
    text = row.text("prompt")
    parts = _IMG.split(text)  # every second one is the name of an image
    if len(parts) == 1:
        raise row.error(["prompt"], "an image as <img>NAME</img>", text)
    return tuple(row.image(part, folder) if place % 2 else part for place, part in enumerate(parts) if part)


def score(items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[Metric]:
    """Right answers."""
    return [by_item("accuracy", items, [float(predictions[item.id].choice == item.reference) for item in items])]


MULTIPLE_CHOICE = (
    Task(
        "scienceqa",
        "ScienceQA (test, with image)",
        read_scienceqa,
        score,
        "Qwen-VL eval_mm/evaluate_multiple_choice.py",
    ),
    Task("seed_bench", "SEED-Bench", read_seed_bench, score, "Qwen-VL eval_mm/seed_bench/eval.py"),
)
