"""One entry of a conversation file, in the formats that people train with, as turns of text with their images.

    Qwen-VL      {"conversations": [{"from": "user", "value": "Picture 1: <img>street.jpg</img>\\nWhere is the car?"},
                                    {"from": "assistant", "value": "<box>(131,412),(389,640)</box>"}, ...]}
    LLaVA        {"image": "street.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhere is the car?"},
                                                           {"from": "gpt", "value": "..."}]}
    ms-swift     {"query": "...", "response": "...", "history": [["...", "..."]], "system": "...", "images": [...]}, or
                 {"messages": [{"role": "user", "content": "<image>Where is the car?"}, ...], "images": [...]}
    OpenAI       {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "street.jpg"}},
                                                            {"type": "text", "text": "Where is the car?"}]}, ...]}
    plain text   {"text": "..."}

An image becomes `Picture N: <img>path</img>` in its place, as in Qwen-VL's own training; images without an <image> in
any text go before the first question.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from qvl_edge.errors import CalibrationError
from qvl_edge.published import SYSTEM

EXAMPLE = """[{"id": "1", "conversations": [
  {"from": "user", "value": "Picture 1: <img>street.jpg</img>\\nWhere is the red car?"},
  {"from": "assistant", "value": "<ref>The red car</ref><box>(131,412),(389,640)</box>"}]}]"""
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_TAG = re.compile(r"<image>\n?")
_UNKNOWN = ("videos", "video", "audios", "audio", "objects", "tools")  # what they stand for would be lost

Content: TypeAlias = str | list[tuple[str, str]]
"""What an entry holds: a text, or the (query, answer) turns of a conversation."""
_Turn: TypeAlias = tuple[Any, Any]
"""Role and content of a message, as they are in the file."""


@dataclass(frozen=True)
class Entry:
    """An entry, and the file and place in it, for messages."""

    where: str
    content: Content
    system: str = SYSTEM


def read_entry(entry: Any, where: str) -> Entry:
    """CalibrationError if `entry` has neither text nor a complete conversation, or something that would be dropped."""
    if not isinstance(entry, dict):
        raise CalibrationError(f'{where} has neither "conversations" nor "text"; an example:\n{EXAMPLE}')
    for name in _UNKNOWN:
        if entry.get(name):
            raise CalibrationError(f"{where} has {name!r}, which would be lost; only texts and images are read")
    messages = _messages(entry, where)
    if messages is None:
        if isinstance(text := entry.get("text"), str) and text:
            return Entry(where, text)
        raise CalibrationError(
            f'{where} has neither "conversations", "messages", "query" and "response", nor "text"; an example:\n'
            f"{EXAMPLE}"
        )
    images = _Images(_listed(entry, where), where)
    system, values = entry.get("system") or None, list[str]()
    for index, (given, content) in enumerate(messages):
        turn, expected = f"{where}: turn {index + 1}", ("user", "assistant")[len(values) % 2]
        role = _ROLES.get(given) if isinstance(given, str) else None
        if role is None:
            raise CalibrationError(f'{turn} is "from" {given!r}, known are {", ".join(_ROLES)}')
        if role == "system" and index == 0 and isinstance(content, str) and system is None:
            system = content
            continue
        if role != expected:
            raise CalibrationError(f"{turn} is from {given}, expected {expected}; turns alternate, user first")
        before, text = images.number, images.placed(content, turn)
        if not text.strip():
            raise CalibrationError(f'{turn} has no "value" text')
        if role == "assistant" and images.number != before:
            raise CalibrationError(f"{turn} is an answer with an image; images belong to questions")
        values.append(text)
    if len(values) % 2 or not values:
        raise CalibrationError(f"{where}: the last question has no assistant answer; add it or remove the question")
    values[0] = images.left() + values[0]
    return Entry(where, list(zip(values[::2], values[1::2], strict=True)), SYSTEM if system is None else str(system))


def _messages(entry: Mapping[str, Any], where: str) -> list[_Turn] | None:
    """(role, content) of each message; None if the entry is no conversation."""
    for name in ("conversations", "messages"):
        if isinstance(found := entry.get(name), list) and found:
            return [
                (one.get("from", one.get("role")), one.get("value", one.get("content")))
                if isinstance(one, dict)
                else (None, None)
                for one in found
            ]
    if "query" not in entry or "response" not in entry:
        return None
    history = entry.get("history") or []
    if not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise CalibrationError(f"{where}: history holds something else than [query, response] pairs")
    pairs = [*history, (entry["query"], entry["response"])]
    return [turn for query, response in pairs for turn in (("user", query), ("assistant", response))]


def _listed(entry: Mapping[str, Any], where: str) -> list[str]:
    """The images that stand beside the conversation."""
    found = entry.get("images") or entry.get("image") or []
    return [_path(image, where) for image in (found if isinstance(found, list) else [found])]


def _path(image: Any, where: str) -> str:
    """A path, URL or data URI, of what formats name an image by. CalibrationError for anything else."""
    if isinstance(image, dict):  # {"path": …, "bytes": null} of ms-swift, {"url": …} of OpenAI
        image = next((image[key] for key in ("path", "url") if image.get(key)), None)
    if not isinstance(image, str) or not image:
        raise CalibrationError(f"{where} has an image that is {image!r:.60}, expected a path or a data URI")
    return image


class _Images:
    """Puts an entry's images into its texts, numbered from 1."""

    def __init__(self, listed: list[str], where: str):
        self._listed, self._where = listed, where
        self.number = 0  # of pictures so far
        self._tags = 0  # <image> so far

    def placed(self, content: Any, turn: str) -> str:
        """The text of a message, with a picture for each <image> in it, or image part."""
        if isinstance(content, str):
            return _TAG.sub(self._next, content)
        if not isinstance(content, list):
            raise CalibrationError(f'{turn} has no "value" text')
        return "".join(self._part(part, turn) for part in content)

    def _part(self, part: Any, turn: str) -> str:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return self.placed(part["text"], turn)
        if kind in ("image_url", "image"):
            return self._picture(_path(part.get("image_url") or part.get("image") or part.get("url"), turn))
        raise CalibrationError(f"{turn} has the part {part!r:.60}; known are the types text, image_url and image")

    def _next(self, tag: re.Match[str]) -> str:
        self._tags += 1
        return self._picture(self._listed[self._tags - 1]) if self._tags <= len(self._listed) else ""

    def _picture(self, path: str) -> str:
        self.number += 1
        return f"Picture {self.number}: <img>{path}</img>\n"

    def left(self) -> str:
        """The images where no text has an <image>. CalibrationError for more or fewer <image> than images."""
        if self._tags not in (0, len(self._listed)):
            raise CalibrationError(
                f"{self._where} has {len(self._listed)} images and {self._tags} <image> in its texts; make them as many"
            )
        return "" if self._tags else "".join(map(self._picture, self._listed))
