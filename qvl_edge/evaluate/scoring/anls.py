"""ANLS, average normalized Levenshtein similarity (arXiv:1905.13648): how alike two readings are; 0 below a half."""

from collections.abc import Sequence

from qvl_edge.evaluate.task import QualityDataError

THRESHOLD = 0.5


def anls(prediction: str, references: Sequence[str]) -> float:
    """0 to 1: the likest reference counts; letter case and the width of white space do not.

    As in the script of DocVQA and InfographicVQA that Qwen-VL's eval_mm/infographicsvqa_eval.py is. Two of its ways
    differ from the package `anls` and from the paper: a similarity of exactly 0.5 counts, and the distance is divided
    by the length of the texts as given, white space included.
    """
    if not references:
        raise QualityDataError("an item has no reference; ANLS needs one or more")
    distances = []
    for reference in references:
        length = max(len(reference.upper()), len(prediction.upper()))
        distances.append(levenshtein(_plain(reference), _plain(prediction)) / length if length else 0.0)
    similarity = 1.0 - min(distances)
    return similarity if similarity >= THRESHOLD else 0.0


def levenshtein(one: str, other: str) -> int:
    """The fewest characters to insert, delete or replace that turn one text into the other."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        above, row = row, [i]
        for j, wanted in enumerate(other, 1):
            row.append(min(above[j - 1] + (letter != wanted), above[j] + 1, row[-1] + 1))
    return row[-1]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
