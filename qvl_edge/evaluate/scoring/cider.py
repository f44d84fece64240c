"""CIDEr-D of captions (arXiv:1411.5726), as pycocoevalcap 1.2 computes it."""

import math
from collections import Counter
from collections.abc import Sequence

from qvl_edge.evaluate.scoring.ptb import tokenize
from qvl_edge.evaluate.task import QualityDataError

LONGEST = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of the penalty on a length that differs
Gram = tuple[str, ...]


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The score of every candidate, 0 to 10, against its references (one or more, their number may differ).

    The mean is what COCOEvalCap prints as "CIDEr"; papers give 100 times that. A score depends on the whole corpus,
    whose references say how rare an n-gram is: a part of it has other scores, and one item alone scores 0.
    """
    for index, given in enumerate(references):
        if not given:
            raise QualityDataError(f"item {index} of {len(references)} has no reference; CIDEr needs one or more")
    wanted = [[tokenize(one) for one in some] for some in references]
    items_with = Counter(gram for some in wanted for gram in set().union(*map(_grams, some)))
    unseen = math.log(max(1, len(wanted)))
    rarity = {gram: unseen - math.log(count) for gram, count in items_with.items()}

    def weigh(words: Sequence[str]) -> dict[Gram, float]:
        return {gram: count * rarity.get(gram, unseen) for gram, count in _grams(words).items()}

    scores = []
    for words, some in zip(map(tokenize, candidates), wanted, strict=True):
        weights = weigh(words)
        total = sum(
            _cosines(weights, weigh(reference)) * math.exp(-((len(words) - len(reference)) ** 2) / (2 * SIGMA**2))
            for reference in some
        )
        scores.append(10.0 * total / LONGEST / len(some))
    return scores


def _cosines(ours: dict[Gram, float], theirs: dict[Gram, float]) -> float:
    """The cosine of each length of n-gram, added up; what a candidate repeats counts as often as in the reference."""
    shared, ours_squared, theirs_squared = [0.0] * LONGEST, [0.0] * LONGEST, [0.0] * LONGEST
    for gram, weight in ours.items():
        ours_squared[len(gram) - 1] += weight * weight
        shared[len(gram) - 1] += min(weight, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0)
    for gram, weight in theirs.items():
        theirs_squared[len(gram) - 1] += weight * weight
    norms = [math.sqrt(one * other) for one, other in zip(ours_squared, theirs_squared, strict=True)]
    return sum(dot / norm for dot, norm in zip(shared, norms, strict=True) if norm)


def _grams(words: Sequence[str]) -> Counter[Gram]:
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))
