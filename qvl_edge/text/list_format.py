"""Upstream's list format: [{"image": …}, {"text": …}, {"ref": …, "box": …}] <-> text with markup.

Source: tokenization_qwen.py, from_list_format and to_list_format.
"""

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from qvl_edge.errors import PromptError
from qvl_edge.text.boxes import read_points
from qvl_edge.text.tokenizer import BOX, BOX_END, IMG, IMG_END, QUAD, QUAD_END, REF, REF_END

KINDS = ({"image"}, {"text"}, {"ref"}, {"box"}, {"quad"}, {"ref", "box"}, {"ref", "quad"})
TAGS = {IMG: ("image", IMG_END), REF: ("ref", REF_END), BOX: ("box", BOX_END), QUAD: ("quad", QUAD_END)}
POINTS = {"box": 2, "quad": 4}  # points a tag holds
_OPENING = re.compile("|".join(TAGS))


def from_list_format(elements: Sequence[Mapping[str, Any]]) -> str:
    """A list of elements -> text. Images become "Picture N:<img>PATH</img>" and a newline, N from 1 in each call.

    Beside upstream's elements: `quad`, a `ref` alone, and coordinates as one box, several, or the string that
    to_list_format gives. PromptError: an element that is none of these, or an image that is neither a path nor a data
    URI (such an image has no place in text; give the list itself as the query).
    """
    if not isinstance(elements, list | tuple):
        raise PromptError(f"the elements are a {type(elements).__name__}, expected a list of them")
    pieces, pictures = [], 0
    for element in elements:
        if check_element(element) == {"image"}:
            pictures += 1
            pieces.append(f"Picture {pictures}:{IMG}{_path(element['image'])}{IMG_END}\n")
        else:
            pieces.append(element_text(element))
    return "".join(pieces)


def to_list_format(text: str) -> list[dict[str, str]]:
    """Text with markup -> a list of {"text"}, {"image"}, {"ref"}, {"box"} and {"quad"} elements, contents as strings.

    PromptError: a tag left open, or a box or quad without its two or four points (upstream fails on the same text with
    ValueError or AssertionError; parse_boxes is the one that skips what is malformed).
    """
    if not isinstance(text, str):
        raise PromptError(f"the text is a {type(text).__name__}, expected a string")
    text = unicodedata.normalize("NFC", text)
    elements = []
    end = 0
    while (found := _OPENING.search(text, end)) is not None:
        start, tag = found.start(), found[0]
        key, closing = TAGS[tag]
        stop = text.find(closing, start)
        if stop < 0:
            raise PromptError(
                f"{tag} at character {start} is left open: {text[start : start + 40]!r}; close it with {closing}"
            )
        content = text[start + len(tag) : stop]
        if key in POINTS and read_points(content, POINTS[key]) is None:
            raise PromptError(f"{tag} at character {start} holds {content[:40]!r}, expected {POINTS[key]} points (x,y)")
        if start > end:
            elements.append({"text": text[end:start]})
        elements.append({key: content})
        end = stop + len(closing)
    if end < len(text):
        elements.append({"text": text[end:]})
    return elements


def check_element(element: Mapping[str, Any]) -> set[str]:
    """The keys of an element. PromptError if they are not one of the known kinds: no key is dropped silently."""
    keys = set(element) if isinstance(element, Mapping) else None
    if keys not in KINDS:
        shown = sorted(map(str, keys)) if keys is not None else repr(element)[:60]
        raise PromptError(
            f"a query element has {shown}; known are image, text, ref, box, quad, and ref with box or with quad"
        )
    assert keys is not None
    return keys


def element_text(element: Mapping[str, Any]) -> str:
    """The text of a checked element that is no image."""
    for key in ("text", "ref"):
        if key in element and not isinstance(element[key], str):
            raise PromptError(f"{key!r} of a query element is a {type(element[key]).__name__}, expected a string")
    if "text" in element:
        return str(element["text"])
    pieces = [f"{REF}{element['ref']}{REF_END}"] if "ref" in element else []
    for key, tag, closing in (("box", BOX, BOX_END), ("quad", QUAD, QUAD_END)):
        for points in _coordinates(key, element.get(key, [])):
            pieces.append(tag + ",".join(f"({x},{y})" for x, y in points) + closing)
    return "".join(pieces)


def _coordinates(key: str, value: Any) -> list[tuple[tuple[int, int], ...]]:
    """One box or quad as a string or as 4 or 8 numbers, or several of the latter; fractions are cut, as upstream."""
    count = POINTS[key]
    if isinstance(value, str):
        written = read_points(value, count)
        if written is not None:
            return [written]
    else:
        try:
            rows = list(value)
            rows = [rows] if rows and not hasattr(rows[0], "__len__") else rows
            numbers = [[int(number) for number in row] for row in rows]
            if all(len(row) == 2 * count for row in numbers):
                return [tuple(zip(row[::2], row[1::2], strict=True)) for row in numbers]
        except (TypeError, ValueError, OverflowError):
            pass
    raise PromptError(f"{key!r} of a query element is {value!r:.80}, expected {2 * count} numbers or a list of such")


def _path(image: Any) -> str:
    if not isinstance(image, str | os.PathLike):
        raise PromptError(
            f"an image of type {type(image).__name__} cannot be written into text; give the list itself as the query"
        )
    path = str(os.fspath(image))
    if IMG_END in path:
        raise PromptError(f"the image path {path!r:.80} contains {IMG_END}; give the list itself as the query")
    return path
