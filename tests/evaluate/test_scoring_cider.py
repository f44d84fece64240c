"""CIDEr against pycocoevalcap's numbers, and what must hold for any corpus."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest

from qvl_edge.evaluate.scoring.cider import cider
from qvl_edge.evaluate.task import QualityDataError

GOLDEN = json.loads((Path(__file__).parents[1] / "data/scoring/cider.json").read_text(encoding="utf-8"))
CANDIDATES = [item[0] for item in GOLDEN["items"]]
REFERENCES = [item[1] for item in GOLDEN["items"]]
TOLERANCE = 1e-6  # of float64 sums of a few hundred terms, in another order; the two differ by 1e-15 in practice


def test_scores_are_those_of_pycocoevalcap():
    scores = cider(CANDIDATES, REFERENCES)
    assert scores == pytest.approx([item[2] for item in GOLDEN["items"]], abs=TOLERANCE)
    assert sum(scores) / len(scores) == pytest.approx(GOLDEN["mean"], abs=TOLERANCE)


def test_pycocoevalcap_agrees_live():
    official = pytest.importorskip("pycocoevalcap.cider.cider", reason="pip install pycocoevalcap")
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    if shutil.which("java") is None:
        pytest.skip("pycocoevalcap's tokenizer needs java on the PATH")
    rng = random.Random(1)
    pool = [caption for some in REFERENCES for caption in some]
    references = [rng.choices(pool, k=rng.randrange(1, 6)) for _ in range(100)]
    candidates = rng.choices(pool, k=100)
    mean, scores = official.Cider().compute_score(
        tokenizer.tokenize({i: [{"caption": one} for one in some] for i, some in enumerate(references)}),
        tokenizer.tokenize({i: [{"caption": one}] for i, one in enumerate(candidates)}),
    )
    assert cider(candidates, references) == pytest.approx(list(scores), abs=TOLERANCE)


def test_the_written_formula_on_two_pictures():
    # one picture has "red bike", the other "blue bike": "bike" is everywhere, so it weighs log(2/2) = 0
    scores = cider(["red bike", "red bike"], [["red bike"], ["blue bike"]])
    # equal: cosine 1 for 1-grams and 2-grams, none longer; 10 / 4 * (1 + 1). Nothing rare in common: 0.
    assert scores == pytest.approx([5.0, 0.0], abs=TOLERANCE)
    # a word more: the cosine of (log 2, log 2) with (log 2, 0), and exp(-1 / (2 * 36))
    longer = cider(["red sofa", "x"], [["red"], ["blue"]])[0]
    assert longer == pytest.approx(10 / 4 / math.sqrt(2) * math.exp(-1 / 72), abs=TOLERANCE)


def test_scores_lie_between_0_and_10_and_the_reference_itself_has_the_most():
    long = [[caption + " and a lamp"] for caption, *_ in REFERENCES]
    best = cider([caption for (caption,) in long], long)
    assert best == pytest.approx([10.0] * len(long), abs=TOLERANCE)
    assert all(-TOLERANCE <= score <= 10 + TOLERANCE for score in cider(CANDIDATES, long))


def test_the_order_of_references_does_not_matter():
    turned = [some[::-1] for some in REFERENCES]
    assert cider(CANDIDATES, turned) == pytest.approx(cider(CANDIDATES, REFERENCES), abs=TOLERANCE)


def test_one_item_alone_and_an_empty_candidate_score_0_and_no_items_have_no_scores():
    assert cider(["a dog"], [["a dog"]]) == [0.0]
    assert cider(["", "a cat"], [["a dog"], ["a cat"]])[0] == 0.0
    assert cider([], []) == []


def test_an_item_without_a_reference_is_named():
    with pytest.raises(QualityDataError, match="item 1 of 2"):
        cider(["a", "b"], [["a"], []])
