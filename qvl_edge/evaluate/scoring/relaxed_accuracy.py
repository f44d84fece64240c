"""ChartQA's relaxed accuracy (arXiv:2203.10244): a number may be 5 % off, a text must be the same."""

from collections.abc import Sequence

from qvl_edge.evaluate.task import QualityDataError

TOLERANCE = 0.05


def relaxed_accuracy(prediction: str, references: Sequence[str], *, swapped: bool = False) -> float:
    """1.0 if the answer is right by any reference, else 0.0.

    As pix2struct's metrics.py: "12%" is 0.12, the error is a part of the reference, and letter case does not count. A
    reference of 0, which has no 5 %, and whatever float() cannot read are compared as text.
    swapped: the error is a part of the prediction instead. Qwen-VL's evaluate_vqa.py calls the function with the two
    exchanged, so its published figures are of this kind; they differ between 4.76 and 5.26 % off, and around 0.
    """
    if not references:
        raise QualityDataError("an item has no reference; relaxed accuracy needs one or more")
    answer = prediction.strip()
    pairs = [(answer, one) if swapped else (one, answer) for one in references]
    return float(any(_within(target, given) for target, given in pairs))


def _within(target: str, given: str) -> bool:
    wanted, number = _number(target), _number(given)
    if number is None or not wanted:
        return target.lower() == given.lower()
    return abs(number - wanted) / abs(wanted) <= TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None
