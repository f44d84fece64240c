"""MME's scores against lmms-eval's sums, and by hand where that one reads answers otherwise."""

import json
from pathlib import Path

import pytest

from qvl_edge.evaluate.item import Item, Prediction
from qvl_edge.evaluate.scoring.yes_no import SUBTASKS, read_yes_no
from qvl_edge.evaluate.tasks.mme import MME

GOLDEN = json.loads((Path(__file__).parents[1] / "data/scoring/yes_no.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-6  # sums of a few hundred quotients in float64


def totals(rows: list[tuple[str, str, str, str]]) -> dict[str, float]:
    """MME's sums of (subtask, picture, answer, truth), two rows a picture in a row."""
    items, predictions = [], {}
    for number, (subtask, picture, answer, truth) in enumerate(rows):
        items.append(Item(str(number), ("?",), truth.lower(), group=subtask, unit=f"{subtask}/{picture}"))
        predictions[str(number)] = Prediction(str(number), answer)
    assert MME.totals is not None
    return MME.totals(MME.score(items, predictions))


def test_the_totals_are_those_of_lmms_eval() -> None:
    rows = sorted(GOLDEN["items"], key=lambda row: row[:2])
    found = totals(rows)
    assert {part: found[part] for part in GOLDEN["totals"]} == pytest.approx(GOLDEN["totals"], abs=TOLERANCE)


def test_a_picture_counts_in_accuracy_plus_only_if_both_answers_are_right() -> None:
    rows = [("OCR", "a", "Yes", "Yes"), ("OCR", "a", "No", "No"), ("OCR", "b", "Yes", "Yes"), ("OCR", "b", "Yes", "No")]
    assert totals(rows) == pytest.approx({"perception (1 of 10 subtasks)": 125.0, "OCR": 125.0}, abs=TOLERANCE)


def test_all_right_is_2000_and_800_and_silence_is_0() -> None:
    names = [name for part in SUBTASKS.values() for name in part]
    right = [(name, "a", said, truth) for name in names for said, truth in (("yes", "Yes"), ("NO.", "No"))]
    silent = [(name, picture, said, truth) for name, picture, _, truth in right for said in ("",)]
    for rows, most in ((right, (2000.0, 800.0)), (silent, (0.0, 0.0))):
        found = totals(rows)
        assert (found["perception"], found["cognition"]) == most


@pytest.mark.parametrize(
    ("text", "said"),
    [("Yes", "yes"), ("no, it is not", "no"), ("None", "no"), ("A yes", "other"), ("\nYes", "yes"), ("y", "other")],
)
def test_the_first_four_characters_decide(text: str, said: str) -> None:
    assert read_yes_no(text) == said
