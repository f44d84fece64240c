"""Exact match, and the words taken out of a sentence for GQA. No package has upstream's rule: worked by hand."""

import pytest

from qvl_edge.evaluate.scoring.exact import exact_match, gqa_answer
from qvl_edge.evaluate.task import QualityDataError


def test_letter_case_and_outer_white_space_do_not_count_and_any_reference_will_do():
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
def test_an_answer_is_taken_out_of_a_sentence(text, answer):
    assert gqa_answer(text) == answer


def test_an_item_without_a_reference_is_refused():
    with pytest.raises(QualityDataError, match="no reference"):
        exact_match("a", [])
