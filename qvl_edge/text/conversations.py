"""Qwen-VL's conversation files as token ids and images: calibration data, and texts to score.

A file is one of
    *.json   Qwen-VL's fine-tuning format: a list of {"conversations": [{"from": "user", "value": "Picture 1:
             <img>street.jpg</img>\\nWhere is the car?"}, {"from": "assistant", "value": "..."}, ...]}
    *.jsonl  one such entry a line, or {"text": "..."}
    *.txt    one text a line
Conversations become ChatML as in training, pictures go through the model's own ViT; texts are taken as they are. Paths
of pictures are relative to the file's folder.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl_edge.config import IMAGE_TOKENS, Config
from qvl_edge.errors import CalibrationError, ConfigError, ImageError, PromptError
from qvl_edge.text.prompt import Prompt, Query, chat_prompt, raw_prompt
from qvl_edge.text.tokenizer import GROUNDING, IM_END, Tokenizer
from qvl_edge.vision.image import ImageLike, content_key, load_image

SYSTEM = "You are a helpful assistant."  # of Qwen-VL's fine-tuning (finetune.py) and of its chat
EXAMPLE = """[{"id": "1", "conversations": [
  {"from": "user", "value": "Picture 1: <img>street.jpg</img>\\nWhere is the red car?"},
  {"from": "assistant", "value": "<ref>The red car</ref><box>(131,412),(389,640)</box>"}]}]"""
_ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Sample:
    """Token ids of one sample, and the pictures whose features go into its slots."""

    ids: list[int]
    image_starts: list[int]  # index in `ids` of the first of each picture's 256 slots
    images: list[ImageLike]
    image_keys: list[str]  # content of each picture: it is encoded once, wherever it appears
    where: str  # for messages


def check_tokenizer(tokenizer: Tokenizer, config: Config) -> None:
    """ConfigError if ids of this tokenizer are not those of the model."""
    start = tokenizer.specials["<img>"]
    if tokenizer.vocab_size > config.vocab_size or start != config.visual.image_start_id:
        raise ConfigError(
            f"qwen.tiktoken has {tokenizer.vocab_size} tokens with <img> at {start}, config.json has "
            f"vocab_size {config.vocab_size} and image_start_id {config.visual.image_start_id}; "
            "copy this model's qwen.tiktoken"
        )


def conversation_sample(
    tokenizer: Tokenizer, turns: Sequence[tuple[Query, str]], *, seqlen: int, where: str, folder: Path | None = None
) -> Sample | None:
    """A conversation of (query, answer) turns as a sample of at most `seqlen` tokens; see `_shortened` for None.

    CalibrationError names `where` if a picture cannot be read or its markup is left open.
    """
    try:
        prompt = chat_prompt(tokenizer, turns[-1][0], turns[:-1], SYSTEM, max_window_size=1 << 62, markup_images=True)
    except PromptError as error:
        raise CalibrationError(f"{where}: {error}") from None
    ids = [*prompt.ids, *tokenizer.encode(turns[-1][1], GROUNDING), tokenizer.specials[IM_END], *tokenizer.encode("\n")]
    return _shortened(Prompt(ids, prompt.image_starts, prompt.images), seqlen, where, folder)


def text_sample(
    tokenizer: Tokenizer, text: str, *, seqlen: int, where: str, folder: Path | None = None
) -> Sample | None:
    """A text as the base model reads it, `<img>path</img>` being a picture; otherwise as conversation_sample."""
    try:
        prompt = raw_prompt(tokenizer, text, markup_images=True)
    except PromptError as error:
        raise CalibrationError(f"{where}: {error}") from None
    return _shortened(prompt, seqlen, where, folder)


def _shortened(prompt: Prompt, seqlen: int, where: str, folder: Path | None) -> Sample | None:
    """The first `seqlen` tokens, or fewer where that would cut a picture: it goes as a whole.

    None if a sample with pictures would lose all of them: what stays says nothing about how pictures are read.
    """
    cut = min(len(prompt.ids), seqlen)
    for start in prompt.image_starts:
        if start - 1 < cut < start + IMAGE_TOKENS + 1:  # <img>, the slots, </img>
            cut = start - 1
    starts = [start for start in prompt.image_starts if start < cut]
    if cut == 0 or (prompt.image_starts and not starts):
        return None
    images = [_placed(image, folder) for image in prompt.images[: len(starts)]]
    try:
        keys = [content_key(load_image(image)) for image in images]
    except ImageError as error:
        raise CalibrationError(f"{where}: {error}") from None
    return Sample(prompt.ids[:cut], starts, images, keys, where)


def _placed(image: ImageLike, folder: Path | None) -> ImageLike:
    if not isinstance(image, str) or folder is None or image.startswith(("data:", "http://", "https://")):
        return image
    return str(folder / image)  # an absolute path stays one


def read_samples(file: Path, tokenizer: Tokenizer, *, samples: int, seqlen: int, seed: int) -> list[Sample]:
    """At most `samples` samples of a file, in its order; of a longer file a subset chosen by `seed`.

    Every entry's form is checked, chosen or not; pictures and markup only of those chosen. CalibrationError names the
    entry or line.
    """
    if samples < 1 or seqlen < 1:
        raise CalibrationError(f"samples is {samples} and seqlen is {seqlen}; both are at least 1")
    makers = list(_entries(file, tokenizer, seqlen))
    if not makers:
        raise CalibrationError(f"{file} is empty; it holds no calibration sample. An example of one:\n{EXAMPLE}")
    chosen = sorted(random.Random(seed).sample(range(len(makers)), min(samples, len(makers))))
    made = [sample for sample in (makers[index]() for index in chosen) if sample is not None]
    if not made:
        raise CalibrationError(
            f"{file}: at {seqlen} tokens no sample keeps a picture of {IMAGE_TOKENS + 2} tokens whole; raise --seqlen"
        )
    return made


Maker = Callable[[], Sample | None]


def _entries(file: Path, tokenizer: Tokenizer, seqlen: int) -> Iterable[Maker]:
    """Entries of the file, checked, as functions that make their samples."""
    try:
        content = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CalibrationError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{file} is not UTF-8 text: {error}") from None
    folder = file.parent
    if file.suffix == ".txt":
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                yield _maker(tokenizer, {"text": line.strip("\r")}, seqlen, f"{file} line {number}", folder)
    elif file.suffix == ".jsonl":
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                where = f"{file} line {number}"
                yield _maker(tokenizer, _json(line, where), seqlen, where, folder)
    elif file.suffix == ".json":
        entries = _json(content, str(file)) if content.strip() else []
        if not isinstance(entries, list):
            raise CalibrationError(f"{file} is a JSON {type(entries).__name__}, expected a list such as\n{EXAMPLE}")
        for number, entry in enumerate(entries, 1):
            yield _maker(tokenizer, entry, seqlen, f"{file} entry {number}", folder)
    else:
        raise CalibrationError(f"{file} ends in {file.suffix!r}; known are .json, .jsonl and .txt")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where} is not JSON: {error}") from None


def _maker(tokenizer: Tokenizer, entry: Any, seqlen: int, where: str, folder: Path) -> Maker:
    """CalibrationError if `entry` has neither text nor a complete conversation."""
    if isinstance(entry, dict) and isinstance(text := entry.get("text"), str) and text:
        return lambda: text_sample(tokenizer, text, seqlen=seqlen, where=where, folder=folder)
    turns = _turns(entry, where)
    return lambda: conversation_sample(tokenizer, turns, seqlen=seqlen, where=where, folder=folder)


def _turns(entry: Any, where: str) -> list[tuple[Query, str]]:
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
    return list(zip(values[::2], values[1::2], strict=True))


def digest_of(samples: Sequence[Sample]) -> str:
    """sha256 over ids and pictures: tells calibration data apart, wherever it was read from."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.ids, sample.image_starts, sample.image_keys]).encode())
    return digest.hexdigest()
