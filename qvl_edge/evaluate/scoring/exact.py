"""Exact match, as Qwen-VL's eval_mm/evaluate_vqa.py has it for GQA, OCR-VQA and AI2D."""

from collections.abc import Sequence

from qvl_edge.evaluate.task import QualityDataError


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the answer is one of the references, letter case and white space around it aside, else 0.0."""
    if not references:
        raise QualityDataError("an item has no reference; exact match needs one or more")
    answer = prediction.strip().lower()
    return float(any(answer == reference.strip().lower() for reference in references))


def gqa_answer(text: str) -> str:
    """The answer in a sentence, before it is compared for GQA: "It is on the left of it." -> "left".

    What comes before the first of . , ! is kept; then what is between a first and a second "is ", "are ", "a ", "an ",
    "the ", each in turn; then what comes before " of". Upstream looks for letters, not words, so "pizza box" is "box".
    """
    answer = text.strip().split(".")[0].split(",")[0].split("!")[0].lower()
    for word in ("is ", "are ", "a ", "an ", "the "):
        if word in answer:
            answer = answer.split(word)[1]
    return answer.split(" of")[0].strip()
