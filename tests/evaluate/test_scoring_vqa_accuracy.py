"""VQA accuracy against the official VQAEval's numbers."""

import json
import random
from pathlib import Path

import pytest

from qvl_edge.evaluate.scoring.vqa_accuracy import normalize, vqa_accuracy
from qvl_edge.evaluate.task import QualityDataError

GOLDEN = json.loads((Path(__file__).parents[1] / "data/scoring/vqa_accuracy.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-6  # the official one rounds to ten digits of a percentage when asked to


def test_every_text_is_normalized_as_by_the_official_code():
    wrong = [(text, normalize(text), wanted) for text, wanted in GOLDEN["normalized"] if normalize(text) != wanted]
    assert not wrong


def test_accuracies_are_the_official_ones():
    scores = [vqa_accuracy(prediction, answers) for prediction, answers, _ in GOLDEN["items"]]
    assert scores == pytest.approx([item[2] for item in GOLDEN["items"]], abs=TOLERANCE)
    assert 100 * sum(scores) / len(scores) == pytest.approx(GOLDEN["overall"], abs=TOLERANCE)


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_three_others_of_ten_are_enough(agreeing, accuracy):
    # each person is left out once: of three who agree, those three see two others, 3 * 2/3 + 7 * 1 = 9 of 10
    answers = ["red"] * agreeing + [f"no {index}" for index in range(10 - agreeing)]
    assert vqa_accuracy("The red.", answers) == pytest.approx(accuracy, abs=TOLERANCE)


def test_people_lose_punctuation_unless_all_say_the_same():
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 9 + ["shirt"]) == 1.0
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 10) == 0.0  # "t shirt" against the raw "t-shirt": so the official code


def test_people_keep_articles_and_number_words():
    assert vqa_accuracy("the dog", ["the dog"] * 9 + ["cat"]) == 0.0
    assert vqa_accuracy("two", ["2"] * 9 + ["3"]) == 1.0


def test_order_does_not_matter_and_scores_lie_between_0_and_1():
    rng = random.Random(0)
    for prediction, answers, _ in GOLDEN["items"]:
        score = vqa_accuracy(prediction, answers)
        assert 0.0 <= score <= 1.0
        assert vqa_accuracy(prediction, rng.sample(answers, len(answers))) == score


def test_an_item_without_answers_is_refused():
    with pytest.raises(QualityDataError, match="no answers"):
        vqa_accuracy("red", [])
