"""Qwen-VL's conversation files as token ids and images: calibration data, and texts to score.

A file is one of
    *.json   Qwen-VL's fine-tuning format: a list of {"conversations": [{"from": "user", "value": "Picture 1:
             <img>street.jpg</img>\\nWhere is the car?"}, {"from": "assistant", "value": "..."}, ...]}
    *.jsonl  one such entry per line, or {"text": "..."}
    *.txt    one text per line
Conversations become ChatML as in training; texts are taken as they are, as the base model reads them. In both
<img>path</img> is an image, its path relative to the file's folder.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from qvl_edge.config import IMAGE_TOKENS
from qvl_edge.errors import CalibrationError, ImageError, PromptError
from qvl_edge.files import read_jsonl
from qvl_edge.published import SYSTEM
from qvl_edge.text.prompt import Prompt, chat_prompt, raw_prompt
from qvl_edge.text.tokenizer import GROUNDING, IM_END, Tokenizer
from qvl_edge.vision.image import ImageLike, content_key, load_image

EXAMPLE = """[{"id": "1", "conversations": [
  {"from": "user", "value": "Picture 1: <img>street.jpg</img>\\nWhere is the red car?"},
  {"from": "assistant", "value": "<ref>The red car</ref><box>(131,412),(389,640)</box>"}]}]"""
_ROLES = ("user", "assistant")

Content: TypeAlias = str | list[tuple[str, str]]
"""What an entry holds: a text, or the (query, answer) turns of a conversation."""


@dataclass(frozen=True)
class Sample:
    """Token ids of one entry, and the images whose features go into its slots."""

    ids: list[int]
    image_starts: list[int]  # index in `ids` of the first of each image's 256 slots
    images: list[ImageLike]
    image_keys: list[str]  # content of each image: it is encoded once, wherever it appears
    where: str  # file and entry, for messages


def read_samples(file: Path, tokenizer: Tokenizer, *, samples: int, seqlen: int, seed: int) -> list[Sample]:
    """At most `samples` samples of a file, in its order; of a longer file a subset selected by `seed`.

    The form of every entry is checked, selected or not; images and markup only of the selected ones. CalibrationError
    names the entry or line.
    """
    if samples < 1 or seqlen < 1:
        raise CalibrationError(f"samples is {samples} and seqlen is {seqlen}; both are at least 1")
    entries = list(_read_entries(file))
    if not entries:
        raise CalibrationError(f"{file} is empty; it holds no calibration sample. An example of one:\n{EXAMPLE}")
    selected = sorted(random.Random(seed).sample(range(len(entries)), min(samples, len(entries))))
    made = [
        make_sample(tokenizer, content, seqlen=seqlen, where=where, folder=file.parent)
        for where, content in (entries[index] for index in selected)
    ]
    kept = [sample for sample in made if sample is not None]
    if not kept:
        raise CalibrationError(
            f"{file}: at {seqlen} tokens no sample keeps an image of {IMAGE_TOKENS + 2} tokens whole; raise --seqlen"
        )
    return kept


def make_sample(
    tokenizer: Tokenizer, content: Content, *, seqlen: int, where: str, folder: Path | None = None
) -> Sample | None:
    """The first `seqlen` tokens of an entry, or fewer where that would cut an image.

    None if an entry with images would lose all of them: what is left says nothing about how images are read.
    CalibrationError names `where` if an image cannot be read or its markup is left open.
    """
    try:
        prompt = _prompt(tokenizer, content)
        cut = min(len(prompt.ids), seqlen)
        for start in prompt.image_starts:
            if start - 1 < cut < start + IMAGE_TOKENS + 1:  # <img>, the slots, </img>
                cut = start - 1
        starts = [start for start in prompt.image_starts if start < cut]
        if cut == 0 or (prompt.image_starts and not starts):
            return None
        images = [_located(image, folder) for image in prompt.images[: len(starts)]]
        keys = [content_key(load_image(image)) for image in images]
    except (PromptError, ImageError) as error:
        raise CalibrationError(f"{where}: {error}") from None
    return Sample(prompt.ids[:cut], starts, images, keys, where)


def _prompt(tokenizer: Tokenizer, content: Content) -> Prompt:
    if isinstance(content, str):
        return raw_prompt(tokenizer, content, markup_images=True)
    *history, (query, answer) = content
    prompt = chat_prompt(tokenizer, query, history, SYSTEM, max_window_size=1 << 62, markup_images=True)
    ids = [*prompt.ids, *tokenizer.encode(answer, GROUNDING), tokenizer.specials[IM_END], *tokenizer.encode("\n")]
    return Prompt(ids, prompt.image_starts, prompt.images)


def _located(image: ImageLike, folder: Path | None) -> ImageLike:
    if not isinstance(image, str) or folder is None or image.startswith(("data:", "http://", "https://")):
        return image
    return str(folder / image)  # an absolute path stays one


def _read_entries(file: Path) -> Iterator[tuple[str, Content]]:
    """(where, content) of every entry, its form checked."""
    if file.suffix == ".jsonl":
        for number, entry in read_jsonl(file, error=CalibrationError):
            yield _entry(entry, f"{file} line {number}")
    elif file.suffix == ".txt":
        for number, line in enumerate(_read_text(file).split("\n"), 1):
            if line.strip():
                yield f"{file} line {number}", line.strip("\r")
    elif file.suffix == ".json":
        text = _read_text(file)
        try:
            entries = json.loads(text) if text.strip() else []
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{file} is not valid JSON: {error}") from None
        if not isinstance(entries, list):
            raise CalibrationError(f"{file} is a JSON {type(entries).__name__}, expected a list such as\n{EXAMPLE}")
        for number, entry in enumerate(entries, 1):
            yield _entry(entry, f"{file} entry {number}")
    else:
        raise CalibrationError(f"{file} ends in {file.suffix!r}; known are .json, .jsonl and .txt")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CalibrationError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{file} is not UTF-8 text: {error}") from None


def _entry(entry: Any, where: str) -> tuple[str, Content]:
    """CalibrationError if `entry` has neither text nor a complete conversation."""
    if isinstance(entry, dict) and isinstance(text := entry.get("text"), str) and text:
        return where, text
    conversation = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(conversation, list) or not conversation:
        raise CalibrationError(f'{where} has neither "conversations" nor "text"; an example:\n{EXAMPLE}')
    values: list[str] = []
    for index, turn in enumerate(conversation):
        role, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if role not in _ROLES:
            raise CalibrationError(f'{where}: turn {index + 1} is "from" {role!r}, known are "user" and "assistant"')
        if role != _ROLES[index % 2]:
            raise CalibrationError(
                f"{where}: turn {index + 1} is from {role}, expected {_ROLES[index % 2]}; turns alternate, user first"
            )
        if not isinstance(value, str) or not value.strip():
            raise CalibrationError(f'{where}: turn {index + 1} has no "value" text')
        values.append(value)
    if len(values) % 2:
        raise CalibrationError(f"{where}: the last question has no assistant answer; add it or remove the question")
    return where, list(zip(values[::2], values[1::2], strict=True))


def digest_of(samples: Sequence[Sample]) -> str:
    """sha256 over ids and images: tells calibration data apart, wherever it was read from."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.ids, sample.image_starts, sample.image_keys]).encode())
    return digest.hexdigest()
