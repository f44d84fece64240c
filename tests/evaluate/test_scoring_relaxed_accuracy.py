"""Relaxed accuracy against lmms-eval's verdicts, which are pix2struct's rule."""

import json
from pathlib import Path

import pytest

from qvl_edge.evaluate.scoring.relaxed_accuracy import relaxed_accuracy
from qvl_edge.evaluate.task import QualityDataError

GOLDEN = json.loads((Path(__file__).parents[1] / "data/scoring/relaxed_accuracy.json").read_text(encoding="utf-8"))


def test_verdicts_are_those_of_the_published_rule_either_way_round():
    for prediction, reference, verdict, swapped in GOLDEN["items"]:
        assert relaxed_accuracy(prediction, [reference]) == verdict, (prediction, reference)
        assert relaxed_accuracy(prediction, [reference], swapped=True) == swapped, (prediction, reference)


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("105", "100", True),
        ("105.1", "100", False),
        ("95", "100", True),
        ("-105", "-100", True),
        ("5%", "0.05", True),
        ("5", "5%", False),
        ("5%%", "0.05", True),  # so the rule: all percent signs at the end go, and one is counted
        ("0.0", "0", False),  # nothing is within 5 % of 0, and the texts differ
        (" Yes ", "yes", True),
        ("blue", "light blue", False),
        ("1,000", "1000", False),  # not a number to float(), so a text
    ],
)
def test_worked_examples(prediction, reference, right):
    assert relaxed_accuracy(prediction, [reference]) == right


def test_upstream_measures_against_the_prediction():
    assert relaxed_accuracy("95", ["100"]) == 1.0 and relaxed_accuracy("95", ["100"], swapped=True) == 0.0
    assert relaxed_accuracy("105.2", ["100"]) == 0.0 and relaxed_accuracy("105.2", ["100"], swapped=True) == 1.0


def test_any_reference_will_do():
    assert relaxed_accuracy("7", ["3", "7"]) == relaxed_accuracy("7", ["7", "3"]) == 1.0


def test_an_item_without_a_reference_is_refused():
    with pytest.raises(QualityDataError, match="no reference"):
        relaxed_accuracy("a", [])
