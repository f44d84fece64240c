"""Streaming: characters stay whole, stop strings never show."""

import random

import pytest
from conftest import byte_tokenizer

from qvl_edge.text.tokenizer import TextStream

TEXT = "框出红色的车 é 👩‍👩‍👧 <ref>a</ref>"


def test_no_delta_ever_splits_a_character() -> None:
    stream = TextStream(byte_tokenizer())
    deltas = [stream.push(token) for token in TEXT.encode()] + [stream.close()]
    assert "".join(deltas) == TEXT
    assert not any("\ufffd" in delta for delta in deltas)


def test_bytes_that_are_no_character_become_one_replacement_at_the_end() -> None:
    stream = TextStream(byte_tokenizer())
    assert [stream.push(0xE6), stream.push(0xA1), stream.close()] == ["", "", "\ufffd"]


@pytest.mark.parametrize("stop", [("END",), ("ab", "abc", "bcd"), ("车",), ("aab",), ("\n\n", "Observation:")])
def test_deltas_add_up_to_the_text_before_the_first_stop_string(stop: tuple[str, ...]) -> None:
    rng, tokenizer = random.Random(0), byte_tokenizer()
    for _ in range(200):
        text = "".join(rng.choice(["a", "b", "c", "d", "EN", "END", "车", "\n", "Obs"]) for _ in range(12))
        stream, shown = TextStream(tokenizer, stop), ""
        for token in text.encode():
            shown += stream.push(token)
            if stream.stopped:
                break
        shown += stream.close()
        # the stop string that is complete first, as the text grows
        ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
        assert stream.stopped == bool(ends)
        if ends:
            first_end = min(ends)[0]
            assert shown == text[: min(start for end, start in ends if end == first_end)]
        else:
            assert shown == text
