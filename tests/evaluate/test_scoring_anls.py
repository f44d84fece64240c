"""ANLS against lmms-eval's numbers, the package `anls`, and the distance by its definition."""

import json
import random
from functools import cache
from pathlib import Path

import pytest

from qvl_edge.evaluate.scoring.anls import anls, levenshtein
from qvl_edge.evaluate.task import QualityDataError

GOLDEN = json.loads((Path(__file__).parents[1] / "data/scoring/anls.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-6  # one division in float64


def test_scores_are_those_of_the_script():
    scores = [anls(prediction, references) for prediction, references, _ in GOLDEN["items"]]
    assert scores == pytest.approx([item[2] for item in GOLDEN["items"]], abs=TOLERANCE)


def test_the_package_agrees_where_it_follows_the_script():
    official = pytest.importorskip("anls", reason="pip install anls").anls_score
    compared = 0
    for prediction, references, wanted in GOLDEN["items"]:
        if wanted != 0.5 and all(" ".join(text.split()) == text for text in (prediction, *references)):
            assert official(prediction, references) == pytest.approx(anls(prediction, references), abs=TOLERANCE)
            compared += 1
    assert compared > 50


def test_the_distance_is_that_of_its_recursive_definition():
    @cache
    def distance(one: str, other: str) -> int:
        if not one or not other:
            return len(one) + len(other)
        return min(
            distance(one[1:], other) + 1,
            distance(one, other[1:]) + 1,
            distance(one[1:], other[1:]) + (one[0] != other[0]),
        )

    rng = random.Random(0)
    for _ in range(200):
        one, other = ("".join(rng.choices("abc", k=rng.randrange(7))) for _ in range(2))
        assert levenshtein(one, other) == levenshtein(other, one) == distance(one, other)


def test_worked_examples():
    assert anls("Coca Cola", ["coca  cola"]) == 1.0  # letter case and the width of spaces do not count
    assert anls("3.00", ["3.000"]) == pytest.approx(0.8, abs=TOLERANCE)  # one of five characters is missing
    assert anls("abcd", ["abxy"]) == 0.5 and anls("abcd", ["axyz"]) == 0.0  # a half counts, less does not
    assert anls("b", ["a", "b"]) == 1.0  # the likest reference counts


def test_order_does_not_matter_and_scores_are_0_or_a_half_to_1():
    for prediction, references, _ in GOLDEN["items"]:
        score = anls(prediction, references)
        assert score == 0.0 or 0.5 <= score <= 1.0
        assert anls(prediction, references[::-1]) == score


def test_an_item_without_a_reference_is_refused():
    with pytest.raises(QualityDataError, match="no reference"):
        anls("a", [])
