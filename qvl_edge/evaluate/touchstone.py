"""TouchStone: open questions about an image, whose answers another model scores.

The file is touchstone_20230831.tsv, with the image in base64, people's description of it, and GPT-4's answer from that:

    index	question	human_annotation	gpt4_ha_answer	category	task_name	image
    0	What is on the table?	A red cup stands on a table.	A red cup.	Visual Recognition	object	/9j/4AAQ…

A judge sees the model's answer and the reference in both orders, as published, and scores them from 1 to 10; the result
is 100 times the mean of the model's scores. judge.py sends the requests made here. The instruction to the judge is our
own: scores compare models judged by the same judge, not with published tables.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvl_edge.evaluate.records import number_ids, read_rows, save_images
from qvl_edge.evaluate.task import CHAT, Item, Metric, Prediction, Task

SYSTEM = "You compare answers of two assistants to questions about images, strictly and without favour."
REQUEST = """\
An image, described by people who saw it:
{annotation}

A question about the image:
{question}

Answer 1:
{first}

Answer 2:
{second}

Take the description as the image's true content. Score each answer from 1 (useless) to 10 (perfect) by how helpful, \
relevant, correct and complete it is; the order of the two must not matter. Write one line and nothing else: the score \
of answer 1, a space, the score of answer 2."""

_SCORES = re.compile(r"(\d+(?:\.\d+)?)[\s,]+(\d+(?:\.\d+)?)")


def read(file: Path, images: Path | None) -> list[Item]:
    """An item for each question; the reference holds what the judge sees beside the answer."""
    rows = read_rows(file)
    paths = save_images(file, images, [(row, row.text("image")) for row in rows])
    items = []
    for row, path, identity in zip(rows, paths, number_ids(row.get("index") for row in rows), strict=True):
        question = row.text("question")
        reference = {
            "question": question,
            "annotation": row.text("human_annotation"),
            "answer": row.text("gpt4_ha_answer"),
        }
        content = ("Picture 1:", path, "\n" + question)  # as from_list_format writes it
        items.append(Item(identity, content, reference, group=row.text("category")))
    return items


def requests(items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[dict[str, Any]]:
    """Two requests per item, in OpenAI's message format: with the reference first, then with the model's answer first.

    "place" is the model's place among the two answers, 1 or 2.
    """
    found = []
    for item in items:
        answers = [item.reference["answer"], predictions[item.id].text]
        for number, (first, second) in enumerate((answers, answers[::-1]), 1):
            text = REQUEST.format(first=first, second=second, **item.reference)
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
            entry = {"id": f"{item.id}/{number}", "item": item.id, "group": item.group, "place": 3 - number}
            found.append({**entry, "messages": messages})
    return found


def read_scores(text: str) -> tuple[float, float] | None:
    """The two scores on the first line of a verdict; None if it holds anything else."""
    match = _SCORES.fullmatch(text.strip().split("\n")[0].strip())
    scores = (float(match[1]), float(match[2])) if match else None
    return scores if scores and all(1 <= score <= 10 for score in scores) else None


def metrics(requested: Sequence[Mapping[str, Any]], verdicts: Mapping[str, str]) -> list[Metric]:
    """TouchStone's score from the judge's verdicts by request id: an item's is the mean of its readable verdicts, and
    an item without one is left out. The second metric is the share of requests with a readable verdict."""
    scores: dict[str, list[float]] = {}
    groups = {one["item"]: one["group"] for one in requested}
    readable = []
    for one in requested:
        found = read_scores(verdicts.get(one["id"], ""))
        readable.append(float(found is not None))
        if found is not None:
            scores.setdefault(one["item"], []).append(found[one["place"] - 1])
    ids, units = [one["id"] for one in requested], list(scores)
    return [
        Metric(
            "TouchStone score",
            [sum(values) / len(values) for values in scores.values()],
            units,
            [[unit] for unit in units],
            [groups[unit] for unit in units],
        ),
        Metric("readable verdicts", readable, ids, [[one["item"]] for one in requested]),
    ]


def score(items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[Metric]:
    """Nothing: only a judge can score."""
    return []


TOUCHSTONE = Task(
    "touchstone",
    "TouchStone",
    read,
    score,
    source="TouchStone eval.py; the judge's instruction is our own",
    chat_format="chatml",
    generation=CHAT,
    requests=requests,
)
