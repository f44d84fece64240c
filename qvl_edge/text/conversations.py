"""Conversation files as token ids and images: calibration data, and texts to score.

A file is a .json with a list of entries, a .jsonl with one a line (either ending may hold either), or a .txt with one
text a line. Conversations, in any of the formats of text/entries.py, become ChatML as in training; texts are taken as
they are, as the base model reads them. In both <img>path</img> is an image, its path relative to the file's folder.
"""

import hashlib
import json
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvl_edge.config import IMAGE_TOKENS
from qvl_edge.errors import CalibrationError, ImageError, PromptError
from qvl_edge.files import parse_json, read_jsonl, read_text
from qvl_edge.published import SYSTEM
from qvl_edge.text.entries import EXAMPLE, Content, Entry, read_entry
from qvl_edge.text.prompt import Prompt, chat_prompt, raw_prompt
from qvl_edge.text.tokenizer import GROUNDING, IM_END, Tokenizer
from qvl_edge.vision.image import ImageLike, content_key, load_image
from qvl_edge.vision.source import is_path


@dataclass(frozen=True)
class Sample:
    """Token ids of one entry, and the images whose features go into its slots."""

    ids: list[int]
    image_starts: list[int]  # index in `ids` of the first of each image's 256 slots
    images: list[ImageLike]
    image_keys: list[str]  # content of each image: it is encoded once, wherever it appears
    where: str  # file and entry, for messages


def read_samples(
    file: Path, tokenizer: Tokenizer, *, samples: int, seqlen: int, seed: int, images: Path | None = None
) -> list[Sample]:
    """At most `samples` samples of a file, in its order; of a longer file a subset selected by `seed`.

    The form of every entry is checked, selected or not; images and markup only of the selected ones. images: the folder
    in which relative paths begin (default: the file's). CalibrationError names the entry or line; a warning those that
    `seqlen` leaves out.
    """
    if samples < 1 or seqlen < 1:
        raise CalibrationError(f"samples is {samples} and seqlen is {seqlen}; both are at least 1")
    entries = list(_read_entries(file))
    if not entries:
        raise CalibrationError(f"{file} is empty; it holds no calibration sample. An example of one:\n{EXAMPLE}")
    selected = sorted(random.Random(seed).sample(range(len(entries)), min(samples, len(entries))))
    made = [
        make_sample(
            tokenizer, one.content, seqlen=seqlen, where=one.where, folder=images or file.parent, system=one.system
        )
        for one in (entries[index] for index in selected)
    ]
    kept = [sample for sample in made if sample is not None]
    if not kept:
        raise CalibrationError(
            f"{file}: at {seqlen} tokens no sample keeps an image of {IMAGE_TOKENS + 2} tokens whole; raise --seqlen"
        )
    if len(kept) < len(made):
        lost = [entries[index].where for index, one in zip(selected, made, strict=True) if one is None]
        warnings.warn(
            f"{len(lost)} of {len(made)} samples are left out, such as {lost[0]}: within {seqlen} tokens none of their "
            f"images, of {IMAGE_TOKENS + 2} tokens each, is whole; raise --seqlen to keep them",
            stacklevel=2,
        )
    return kept


def make_sample(
    tokenizer: Tokenizer,
    content: Content,
    *,
    seqlen: int,
    where: str,
    folder: Path | None = None,
    system: str = SYSTEM,
) -> Sample | None:
    """The first `seqlen` tokens of an entry, or fewer where that would cut an image.

    None if an entry with images would lose all of them: what is left says nothing about how images are read.
    CalibrationError names `where` if an image cannot be read or its markup is left open.
    """
    try:
        prompt = _prompt(tokenizer, content, system)
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


def _prompt(tokenizer: Tokenizer, content: Content, system: str) -> Prompt:
    if isinstance(content, str):
        return raw_prompt(tokenizer, content, markup_images=True)
    *history, (query, answer) = content
    prompt = chat_prompt(tokenizer, query, history, system, max_window_size=1 << 62, markup_images=True)
    ids = [*prompt.ids, *tokenizer.encode(answer, GROUNDING), tokenizer.specials[IM_END], *tokenizer.encode("\n")]
    return Prompt(ids, prompt.image_starts, prompt.images)


def _located(image: ImageLike, folder: Path | None) -> ImageLike:
    if not isinstance(image, str) or folder is None or not is_path(image):
        return image
    return str(folder / image)  # an absolute path stays one


def _read_entries(file: Path) -> Iterator[Entry]:
    """Every entry, its form checked."""
    if file.suffix == ".txt":
        for number, line in enumerate(read_text(file, error=CalibrationError).split("\n"), 1):
            if line.strip():
                yield Entry(f"{file} line {number}", line.strip("\r"))
    elif file.suffix in (".json", ".jsonl"):
        text = read_text(file, error=CalibrationError).strip()
        if text.startswith("[") or (file.suffix == ".json" and not _is_lines(text)):
            yield from _read_list(file, text)
        else:
            for number, entry in read_jsonl(file, error=CalibrationError):
                yield read_entry(entry, f"{file} line {number}")
    else:
        raise CalibrationError(f"{file} ends in {file.suffix!r}; known are .json, .jsonl and .txt")


def _is_lines(text: str) -> bool:
    """Whether the first line is an object of its own, as in a JSON lines file."""
    try:
        return isinstance(json.loads(text.partition("\n")[0]), dict) and "\n" in text
    except ValueError:
        return False


def _read_list(file: Path, text: str) -> Iterator[Entry]:
    entries = parse_json(text, file, error=CalibrationError) if text else []
    if not isinstance(entries, list):
        raise CalibrationError(f"{file} is a JSON {type(entries).__name__}, expected a list such as\n{EXAMPLE}")
    for number, entry in enumerate(entries, 1):
        yield read_entry(entry, f"{file} entry {number}")


def digest_of(samples: Sequence[Sample]) -> str:
    """sha256 over ids and images: tells calibration data apart, wherever it was read from."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.ids, sample.image_starts, sample.image_keys]).encode())
    return digest.hexdigest()
