"""The rules that short answers are scored by: the official VQAEval's and lmms-eval's figures, and worked examples."""

import json
import random
from functools import cache
from pathlib import Path

import pytest

from qvl_edge.evaluate.task import QualityDataError
from qvl_edge.evaluate.vqa import (
    anls,
    exact_match,
    gqa_answer,
    levenshtein,
    normalize,
    relaxed_accuracy,
    vqa_accuracy,
)

DATA = Path(__file__).parents[1] / "data/scoring"
VQA, ANLS, RELAXED = (
    json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("vqa_accuracy", "anls", "relaxed_accuracy")
)
TOLERANCE = 1e-6  # float64; the official VQAEval rounds to ten digits of a percentage when asked to


@pytest.mark.parametrize("rule", [vqa_accuracy, anls, relaxed_accuracy, exact_match])
def test_an_item_without_a_reference_is_refused(rule):
    with pytest.raises(QualityDataError, match="no reference"):
        rule("a", [])


def test_every_text_is_normalized_as_by_the_official_vqa_eval():
    wrong = [(text, normalize(text), wanted) for text, wanted in VQA["normalized"] if normalize(text) != wanted]
    assert not wrong


def test_vqa_accuracies_are_the_official_ones():
    scores = [vqa_accuracy(prediction, answers) for prediction, answers, _ in VQA["items"]]
    assert scores == pytest.approx([item[2] for item in VQA["items"]], abs=TOLERANCE)
    assert 100 * sum(scores) / len(scores) == pytest.approx(VQA["overall"], abs=TOLERANCE)


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


def test_the_order_of_people_does_not_matter_and_vqa_accuracy_lies_between_0_and_1():
    rng = random.Random(0)
    for prediction, answers, _ in VQA["items"]:
        score = vqa_accuracy(prediction, answers)
        assert 0.0 <= score <= 1.0
        assert vqa_accuracy(prediction, rng.sample(answers, len(answers))) == score


def test_anls_is_that_of_the_published_script():
    scores = [anls(prediction, references) for prediction, references, _ in ANLS["items"]]
    assert scores == pytest.approx([item[2] for item in ANLS["items"]], abs=TOLERANCE)


def test_the_package_anls_agrees_where_it_follows_the_script():
    official = pytest.importorskip("anls", reason="pip install anls").anls_score
    compared = 0
    for prediction, references, wanted in ANLS["items"]:
        if wanted != 0.5 and all(" ".join(text.split()) == text for text in (prediction, *references)):
            assert official(prediction, references) == pytest.approx(anls(prediction, references), abs=TOLERANCE)
            compared += 1
    assert compared > 50


def test_the_levenshtein_distance_is_that_of_its_recursive_definition():
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


def test_worked_examples_of_anls():
    assert anls("Coca Cola", ["coca  cola"]) == 1.0  # case and the width of spaces do not count
    assert anls("3.00", ["3.000"]) == pytest.approx(0.8, abs=TOLERANCE)  # one of five characters is missing
    assert anls("abcd", ["abxy"]) == 0.5 and anls("abcd", ["axyz"]) == 0.0  # a half counts, less does not
    assert anls("b", ["a", "b"]) == 1.0  # the closest reference counts


def test_the_order_of_references_does_not_matter_and_anls_is_0_or_a_half_to_1():
    for prediction, references, _ in ANLS["items"]:
        score = anls(prediction, references)
        assert score == 0.0 or 0.5 <= score <= 1.0
        assert anls(prediction, references[::-1]) == score


def test_relaxed_accuracy_is_that_of_the_published_rule_either_way_round():
    for prediction, reference, verdict, swapped in RELAXED["items"]:
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
def test_worked_examples_of_relaxed_accuracy(prediction, reference, right):
    assert relaxed_accuracy(prediction, [reference]) == right


def test_upstream_measures_relaxed_accuracy_against_the_prediction():
    assert relaxed_accuracy("95", ["100"]) == 1.0 and relaxed_accuracy("95", ["100"], swapped=True) == 0.0
    assert relaxed_accuracy("105.2", ["100"]) == 0.0 and relaxed_accuracy("105.2", ["100"], swapped=True) == 1.0


def test_any_reference_of_relaxed_accuracy_will_do():
    assert relaxed_accuracy("7", ["3", "7"]) == relaxed_accuracy("7", ["7", "3"]) == 1.0


def test_case_and_outer_white_space_do_not_count_in_exact_match_and_any_reference_will_do():
    assert exact_match(" Left ", ["right", "left\n"]) == 1.0
    assert exact_match("left side", ["left"]) == 0.0
    assert exact_match("", [""]) == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes, it is.", "yes"),
        ("The man is on the left of the car.", "left"),
        ("They are dogs! Two", "dogs"),
        ("It is an apple", "apple"),
        ("pizza box", "box"),  # letters, not words: "a " is in "pizza box"
        ("this is what is it", ""),  # between the "is " of "this" and the next one there is nothing
        ("left of", "left"),
        ("a ", "a"),
        ("", ""),
    ],
)
def test_an_answer_is_taken_out_of_a_sentence_for_gqa(text, answer):
    assert gqa_answer(text) == answer
