"""The tokenizer against the original's ids.

data/golden_ranks.tiktoken holds the 840 of qwen.tiktoken's 151,643 ranks that any part of a golden text can become, so
merging goes as with the full file.
"""

import base64
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from qvl_edge.errors import CheckpointError
from qvl_edge.text.tokenizer import GROUNDING, IMG, IMG_END, IMG_PAD, SPECIALS, Tokenizer

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "tokenizer.json").read_text(encoding="utf-8"))
TEXTS = [case for case in GOLDEN["encode"] if IMG not in case["text"]]  # test_prompt.py has those with an image


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


BYTES = {bytes([byte]): byte for byte in range(256)}


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: case["text"][:20])
def test_ids_are_the_originals_with_every_special_token_allowed(full_size: Tokenizer, case: dict[str, Any]) -> None:
    assert full_size.encode(case["text"], SPECIALS) == case["ids"]


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: case["text"][:20])
def test_ids_are_the_originals_with_only_markup_allowed(full_size: Tokenizer, case: dict[str, Any]) -> None:
    markup = (*GROUNDING, IMG, IMG_END, IMG_PAD)
    assert full_size.encode(case["text"], markup) == case["ids_specials_from_markup_only"]


@pytest.mark.parametrize("case", GOLDEN["decode"], ids=lambda case: case["text"][:20])
def test_decoding_gives_the_originals_text(full_size: Tokenizer, case: dict[str, Any]) -> None:
    assert full_size.decode(case["ids"]) == case["text"]
    assert full_size.decode(case["ids"], skip_special_tokens=True) == case["text_skip_special"]


def test_special_tokens_have_the_published_ids(full_size: Tokenizer) -> None:
    expected = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|extra_0|>": 151646}
    expected |= {"<|extra_204|>": 151850, "<ref>": 151851, "</quad>": 151856, "<img>": 151857, "<imgpad>": 151859}
    assert {token: full_size.specials[token] for token in expected} == expected
    assert full_size.vocab_size == 151_860


@pytest.mark.parametrize(
    "token", [token for token in SPECIALS if token not in GROUNDING][::40] + [IMG, IMG_END, IMG_PAD]
)
def test_control_and_image_tokens_in_text_are_letters(full_size: Tokenizer, token: str) -> None:
    ids = full_size.encode(f"a{token}b")
    assert not set(ids) & set(full_size.specials.values())
    assert full_size.decode(ids) == f"a{token}b"


@pytest.mark.parametrize("text", ["", " \t\r\n ", "\x00\x7f", "é", "👩‍👩‍👧", "Ａ龘", "x" * 50_000, " " * 50_000])
def test_decoding_gives_back_normalized_text(full_size: Tokenizer, text: str) -> None:
    assert full_size.decode(full_size.encode(text)) == text


def test_a_lone_surrogate_becomes_a_replacement_character(full_size: Tokenizer) -> None:
    assert full_size.decode(full_size.encode("a\ud800b")) == "a\ufffdb"


def test_ids_past_the_vocabulary_decode_to_nothing(full_size: Tokenizer) -> None:
    assert full_size.decode([9707, full_size.vocab_size, 151_935]) == "Hello"


def test_an_open_or_foreign_image_span_decodes_like_text(full_size: Tokenizer) -> None:
    start, end, pad = (full_size.specials[token] for token in (IMG, IMG_END, IMG_PAD))
    assert full_size.decode([start, 9707]) == "<img>Hello"
    assert full_size.decode([start, 9707, end]) == "<img>Hello</img>"
    assert full_size.decode([start, *[pad] * 256, end, 9707]) == "<img></img>Hello"


def test_a_file_of_bytes_gives_byte_ids_and_specials_after_them(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(write_ranks(tmp_path / "qwen.tiktoken", BYTES))
    assert tokenizer.encode("é<ref>") == [0xC3, 0xA9, 256 + SPECIALS.index("<ref>")]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="qwen.tiktoken cannot be read"):
        Tokenizer.from_file(tmp_path / "qwen.tiktoken")


@pytest.mark.parametrize("line", [b"no-base64! 256", b"IQ==", b"IQ== x", b"IQ== 1 2"])
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, line: bytes) -> None:
    path = write_ranks(tmp_path / "qwen.tiktoken", BYTES)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(CheckpointError, match="line 257 "):
        Tokenizer.from_file(path)


@pytest.mark.parametrize("ranks", [{b"a": 0}, {**BYTES, b"ab": 257}, {**BYTES, b"ab": 255}])
def test_a_cut_or_gapped_file_is_refused(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    with pytest.raises(CheckpointError, match=f"holds {len(ranks)} tokens|lacks 255 of the 256 single bytes"):
        Tokenizer.from_file(write_ranks(tmp_path / "qwen.tiktoken", ranks))


def test_a_file_whose_end_is_missing_in_the_middle_of_a_line_is_refused(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "qwen.tiktoken", {**BYTES, **{b"ab" * n: 255 + n for n in range(1, 9)}})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError):
        Tokenizer.from_file(path)


def test_a_file_without_one_of_the_bytes_is_refused(tmp_path: Path) -> None:
    ranks = {bytes([byte]): byte for byte in range(255)} | {b"ab": 255}
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 256 single bytes, such as 0xff"):
        Tokenizer.from_file(write_ranks(tmp_path / "qwen.tiktoken", ranks))


def test_more_white_space_than_tiktokens_engine_takes_comes_back(full_size: Tokenizer) -> None:
    text = "a" + " " * 1_000_000 + "b"
    assert full_size.decode(full_size.encode(text)) == text


def test_the_work_of_normalizing_grows_with_the_text_and_not_its_square(
    full_size: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 0
    normalize = unicodedata.normalize

    def measured(form: str, text: str) -> str:
        nonlocal longest
        longest = max(longest, len(text))
        return normalize(form, text)

    monkeypatch.setattr("qvl_edge.text.tokenizer.unicodedata.normalize", measured)
    full_size.encode("a" + "\u0301\u0316" * 50_000)  # each pair has to be put in order
    assert longest <= 1_001
