"""Words of captions against what pycocoevalcap's Java tokenizer gave for them."""

import json
import random
import shutil
from pathlib import Path

import pytest

from qvl_edge.evaluate.scoring.ptb import tokenize

GOLDEN = json.loads((Path(__file__).parents[1] / "data/scoring/ptb.json").read_text(encoding="utf-8"))
CAPTIONS = [caption for caption, _ in GOLDEN["captions"]]
PUNCTUATION = "'' ' `` ` . ? ! , : - -- ... ;".split()  # what pycocoevalcap takes out


def test_every_caption_has_the_words_that_the_java_tokenizer_gives():
    wrong = [(caption, tokenize(caption), words) for caption, words in GOLDEN["captions"] if tokenize(caption) != words]
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
def test_worked_examples(caption, words):
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
