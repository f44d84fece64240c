"""Turns -> token ids, with 256 slots for each image: ChatML for the chat model, the text as it is for the base model.

Source: qwen_generation_utils.py (make_context). The ids are upstream's, but for this, on purpose:
- the slots of an image are all <imgpad>; upstream writes the path's bytes there, so its paths end at 256 bytes and ours
  do not, and at exactly 256 its model finds no slot to fill while ours has them all;
- ChatML control tokens in text are plain text in both formats (upstream's raw format lets them act);
- a response in the history never opens an image, whatever it says: the model wrote it, not the caller.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from qvl_edge.config import IMAGE_TOKENS
from qvl_edge.errors import PromptError
from qvl_edge.published import SYSTEM
from qvl_edge.text.list_format import check_element, element_text
from qvl_edge.text.tokenizer import (
    ENDOFTEXT,
    GROUNDING,
    IM_END,
    IM_START,
    IMG,
    IMG_END,
    IMG_PAD,
    Tokenizer,
)
from qvl_edge.vision.source import is_base64, is_data_uri, short


@dataclass(frozen=True)
class ImageRef:
    """Where an image stands in a turn, and the image itself (a path, bytes, a PIL image …; never looked into here)."""

    image: Any

    @property
    def name(self) -> str:
        """The path, or a few words for an image that has none."""
        if isinstance(self.image, str):
            if is_data_uri(self.image):
                return self.image.partition(",")[0] + ",…"
            return short(self.image) if is_base64(self.image) else self.image
        if isinstance(self.image, os.PathLike):
            return str(os.fspath(self.image))
        if isinstance(self.image, bytes | bytearray | memoryview):
            return f"{len(self.image)} bytes"
        return f"{type(self.image).__name__} {getattr(self.image, 'shape', getattr(self.image, 'size', ''))}".strip()


Content: TypeAlias = list[str | ImageRef]
"""What a turn says: text and images in order; no two texts stand side by side."""
Query: TypeAlias = str | Sequence[Mapping[str, Any]] | Content
"""Text, or a list of elements as in from_list_format whose images may be of any kind that load_image takes, or the
texts and images themselves, in order and without the "Picture N:" that an element gets."""


@dataclass(frozen=True)
class Message:
    """A turn of a conversation in any order."""

    role: str  # "system", "user" or "assistant"
    content: Query


History: TypeAlias = Sequence[tuple[Query, str]]
"""Earlier (query, response) turns, oldest first. As upstream, None is taken for a response that never came."""


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the images that belong into them."""

    ids: list[int] = field(default_factory=list)  # an image is <img>, 256 times <imgpad>, </img>
    image_starts: list[int] = field(default_factory=list)  # index in `ids` of each image's first slot, ascending
    images: list[Any] = field(default_factory=list)  # as given, in the same order
    text: str = ""  # the raw text for people, an image shown as <img>NAME</img>


def chat_prompt(
    tokenizer: Tokenizer,
    query: Query,
    history: History,
    system: str,
    *,
    max_window_size: int,
    markup_images: bool,
) -> Prompt:
    """A ChatML prompt that ends where the assistant speaks.

    Turns are taken from the newest back while system and turns stay below `max_window_size` tokens; the query always
    stays, and is not counted (upstream's rule). markup_images: `<img>path</img>` in queries that are text is an image.
    PromptError on an `<img>` left open or a malformed query.
    """
    if not isinstance(system, str):
        raise PromptError(f"system is a {type(system).__name__}, expected a string")
    opening = _turn(tokenizer, "system", _encode(tokenizer, [system]))
    turns: list[Prompt] = []
    size = len(opening.ids)
    newline = _encode(tokenizer, ["\n"])
    for earlier_query, response in _checked(history):
        asked = _turn(tokenizer, "user", _query(tokenizer, earlier_query, markup_images))
        answered = _turn(tokenizer, "assistant", _encode(tokenizer, [response])) if response is not None else Prompt()
        turn = _join([newline, asked, newline, answered])
        if size + len(turn.ids) >= max_window_size:
            break
        size += len(turn.ids)
        turns.append(turn)
    asked = _turn(tokenizer, "user", _query(tokenizer, query, markup_images))
    return _join([opening, *reversed(turns), newline, asked, newline, *_head(tokenizer, "assistant")])


def messages_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], *, continued: bool, max_window_size: int
) -> Prompt:
    """A ChatML prompt of turns in the order given, for the assistant to speak next.

    Without a system turn at the beginning the usual one is there. continued: the last turn is left open if it is the
    assistant's. From the newest back, questions with their answers are taken as in `chat_prompt`, which writes the same
    tokens for a system turn and pairs of turns.
    """
    lead = next((at for at, message in enumerate(messages) if message.role != "system"), len(messages))
    said = list(messages) if lead else [Message("system", SYSTEM), *messages]
    lead = max(lead, 1)
    newline = _encode(tokenizer, ["\n"])
    continued = continued and said[-1].role == "assistant"
    turns = [
        _turn(tokenizer, message.role, _query(tokenizer, message.content, False), end=not continued or at < len(said))
        for at, message in enumerate(said, 1)
    ]
    reply = Prompt() if continued else _join([newline, *_head(tokenizer, "assistant")])
    groups: list[list[Prompt]] = []
    for before, message, turn in zip(said[lead - 1 :], said[lead:], turns[lead:], strict=False):
        if not groups or (before.role == "assistant" and message.role != "assistant"):
            groups.append([])
        groups[-1] += [newline, turn]
    opening = _join([turns[0], *(part for turn in turns[1:lead] for part in (newline, turn))])
    kept, size = groups[-1:], len(opening.ids)
    for group in reversed(groups[:-1]):
        size += sum(len(part.ids) for part in group)
        if size >= max_window_size:
            break
        kept.insert(0, group)
    return _join([opening, *(part for group in kept for part in group), reply])


def raw_prompt(tokenizer: Tokenizer, query: Query, *, markup_images: bool) -> Prompt:
    """The query as it is, for the base model to continue. PromptError as in chat_prompt."""
    return _query(tokenizer, query, markup_images)


def parse_query(query: Query, *, markup_images: bool) -> Content:
    """A query -> its texts and images.

    An image element becomes "Picture N:", the image and a newline, as in from_list_format, N from 1. Content stays as
    it is. markup_images: `<img>path</img>` in text is an image too; otherwise it is just text.
    PromptError: neither text nor a list of known elements, or an `<img>` left open where it counts.
    """
    if isinstance(query, str):
        return _with_markup([query], markup_images)
    if not isinstance(query, list | tuple):  # bytes and arrays are sequences too
        raise PromptError(f"the query is a {type(query).__name__}, expected text or a list of elements")
    parts: Content = []
    picture = 1
    for element in query:
        if isinstance(element, str | ImageRef):
            parts.append(element)
        elif check_element(element) == {"image"}:
            parts += [f"Picture {picture}:", ImageRef(element["image"]), "\n"]
            picture += 1
        else:
            parts.append(element_text(element))
    return _with_markup(_merge(parts), markup_images)


def latest_picture(history: History) -> Any | None:
    """The last image that the queries of chat's `history` show, or None.

    In a query that is text, `<img>path</img>` counts, as in chat; the texts of a list of elements open nothing, and
    responses are not searched: the model wrote them.
    """
    for query, _ in _checked(history):
        content = parse_query(query, markup_images=isinstance(query, str))
        images = [part.image for part in content if isinstance(part, ImageRef)]
        if images:
            return images[-1]
    return None


def stop_token_ids(tokenizer: Tokenizer, chat_format: str) -> frozenset[int]:
    """The ids that end an answer. Both formats end at <|endoftext|>, the eos_token_id of the published models."""
    if chat_format not in ("chatml", "raw"):
        raise PromptError(f"chat_format is {chat_format!r}, known are 'chatml' and 'raw'")
    ends = (IM_END, IM_START, ENDOFTEXT) if chat_format == "chatml" else (ENDOFTEXT,)
    return frozenset(tokenizer.specials[token] for token in ends)


def _checked(history: History) -> Iterable[tuple[Query, str | None]]:
    """The turns of `history` from the newest back."""
    if not isinstance(history, Sequence):
        raise PromptError(f"history is a {type(history).__name__}, expected a list of pairs of query and response text")
    for index in range(len(history) - 1, -1, -1):
        turn = history[index]
        if not isinstance(turn, tuple | list) or len(turn) != 2 or not isinstance(turn[1], str | None):
            raise PromptError(f"history[{index}] is {turn!r:.80}, expected a pair of query and response text")
        yield turn[0], turn[1]


def _merge(parts: Content) -> Content:
    """Join neighbouring texts: where a text is cut decides its ids."""
    merged: Content = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _with_markup(parts: Content, markup_images: bool) -> Content:
    if not markup_images:
        return parts
    found: Content = []
    for part in parts:
        found += _split_images(part) if isinstance(part, str) else [part]
    return found


def _split_images(text: str) -> Content:
    """Cut text at its `<img>path</img>`."""
    parts: Content = []
    end = 0
    while (start := text.find(IMG, end)) >= 0:
        stop = text.find(IMG_END, start)
        if stop < 0:
            raise PromptError(
                f"{IMG} at character {start} is left open: {text[start : start + 40]!r}; close it with {IMG_END}, "
                "or use answer() or ask(), where it is plain text"
            )
        parts += [text[end:start], ImageRef(text[start + len(IMG) : stop])]
        end = stop + len(IMG_END)
    return [part for part in [*parts, text[end:]] if part != ""]


def _query(tokenizer: Tokenizer, query: Query, markup_images: bool) -> Prompt:
    # upstream lets a stray </img> or <imgpad> be its special token; without markup_images both are letters
    allowed = (*GROUNDING, IMG_END, IMG_PAD) if markup_images else GROUNDING
    return _encode(tokenizer, parse_query(query, markup_images=markup_images), allowed)


def _encode(tokenizer: Tokenizer, content: Sequence[str | ImageRef], allowed: tuple[str, ...] = GROUNDING) -> Prompt:
    specials = tokenizer.specials
    slots = [specials[IMG], *[specials[IMG_PAD]] * IMAGE_TOKENS, specials[IMG_END]]
    return _join(
        Prompt(slots, [1], [part.image], f"{IMG}{part.name}{IMG_END}")
        if isinstance(part, ImageRef)
        else Prompt(tokenizer.encode(part, allowed), text=part)
        for part in content
    )


def _special(tokenizer: Tokenizer, token: str) -> Prompt:
    return Prompt([tokenizer.specials[token]], text=token)


def _turn(tokenizer: Tokenizer, role: str, content: Prompt, *, end: bool = True) -> Prompt:
    return _join([*_head(tokenizer, role), content, *([_special(tokenizer, IM_END)] if end else [])])


def _head(tokenizer: Tokenizer, role: str) -> list[Prompt]:
    # role, newline and content are encoded apart (make_context: _tokenize_str); together "\n" could merge with the text
    return [_special(tokenizer, IM_START), _encode(tokenizer, [role]), _encode(tokenizer, ["\n"])]


def _join(prompts: Iterable[Prompt]) -> Prompt:
    ids: list[int] = []
    image_starts: list[int] = []
    images: list[Any] = []
    text = ""
    for prompt in prompts:
        image_starts += [len(ids) + start for start in prompt.image_starts]
        ids += prompt.ids
        images += prompt.images
        text += prompt.text
    return Prompt(ids, image_starts, images, text)
