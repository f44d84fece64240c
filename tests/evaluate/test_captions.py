"""CIDEr and the words of captions against pycocoevalcap's figures, and what must hold for any corpus."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest

from qvl_edge.evaluate.captions import cider, tokenize
from qvl_edge.evaluate.task import QualityDataError

DATA = Path(__file__).parents[1] / "data/scoring"
GOLDEN, WORDS = (json.loads((DATA / f"{name}.json").read_text(encoding="utf-8")) for name in ("cider", "ptb"))
CANDIDATES = [item[0] for item in GOLDEN["items"]]
REFERENCES = [item[1] for item in GOLDEN["items"]]
TOLERANCE = 1e-6  # of float64 sums of a few hundred terms, in another order; the two differ by 1e-15 in practice
CAPTIONS = [caption for caption, _ in WORDS["captions"]]
PUNCTUATION = "'' ' `` ` . ? ! , : - -- ... ;".split()  # what pycocoevalcap removes


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


def test_every_caption_has_the_words_that_the_java_tokenizer_gives():
    wrong = [(caption, tokenize(caption), words) for caption, words in WORDS["captions"] if tokenize(caption) != words]
    assert not wrong


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man can't ride his dog's bike, can he?", "a man ca n't ride his dog 's bike can he"),
        ('The "old" sign (red) says STOP!', "the old sign -lrb- red -rrb- says stop"),  # brackets stay, as upstream
        ("It's 3 1/2 feet & costs £5 or €5...", "it 's 3 1/2 feet & costs # 5 or $ 5"),
        ("I'm gonna sit in the U.S. at 10 a.m.", "i 'm gon na sit in the u.s. at 10 a.m."),
        ("A “no parking” sign – and/or 1,000 t-shirts", "a no parking sign and/or 1,000 t-shirts"),
        ("一只狗在草地上。", "一只狗在草地上 。"),
    ],
)
def test_worked_examples_of_words(caption, words):
    assert tokenize(caption) == words.split()


def test_a_letter_loses_its_period_where_a_sentence_ends():
    assert tokenize("row b. The dog") == ["row", "b", "the", "dog"]
    assert tokenize("row b. two dogs") == ["row", "b.", "two", "dogs"]
    assert tokenize("row b.") == ["row", "b"]


def test_line_breaks_are_spaces_and_an_empty_caption_has_no_words():
    assert [tokenize(text) for text in ("a\nb", "c\r\nd", "e\u2028f", "")] == [["a", "b"], ["c", "d"], ["e", "f"], []]


def test_any_text_gives_lower_case_words_without_punctuation():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(
            chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x250), rng.randrange(0xD800)))) for _ in range(30)
        )
        words = tokenize(text)
        assert all(word == word.lower() and word.split() == [word] and word not in PUNCTUATION for word in words)


def test_the_java_tokenizer_agrees_live():
    official = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="pip install pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("pycocoevalcap's tokenizer needs java on the PATH")
    rng = random.Random(1)
    captions = [f"{rng.choice(CAPTIONS)} {rng.choice(CAPTIONS)}" for _ in range(1000)]
    given = official.PTBTokenizer().tokenize(
        {index: [{"caption": one}, {"caption": "The"}] for index, one in enumerate(captions)}
    )
    assert [tokenize(one) for one in captions] == [given[index][0].split() for index in range(len(captions))]
