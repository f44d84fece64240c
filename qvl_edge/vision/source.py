"""An image in any form that a caller may give it -> the bytes of an image file, or a PIL image.

A string is a data URI, a URL, a file:// URL, base64 or a path: decided by its form alone, never by trying to open it.
"""

import base64
import binascii
import re
from os import PathLike, fsdecode
from pathlib import Path
from typing import Any, Protocol, TypeAlias
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
from PIL import Image

from qvl_edge.errors import ImageError


class Readable(Protocol):
    """An open file: open(…, "rb"), io.BytesIO, sys.stdin.buffer, an upload of a web framework."""

    def read(self, size: int = ..., /) -> bytes:
        """The next bytes."""
        ...


ImageLike: TypeAlias = str | PathLike[str] | bytes | Readable | Image.Image | np.ndarray[Any, Any]
"""A path, a file:// URL, a data URI, base64, the bytes of a file, an open file, a PIL image, or an array (H, W),
(H, W, 1), (H, W, 3) or (H, W, 4) uint8."""

MAX_FILE_BYTES = 100 << 20
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{32,}={0,2}\s*")
# how base64 of JPEG, PNG, GIF, WebP, TIFF, BMP, ICO, and of AVIF and HEIC begins; no path looks so to its end
_BASE64_START = re.compile(r"/9j/|_9j_|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK|Qk|AAABAA|AAAA..Z0eX")
_URLSAFE = bytes.maketrans(b"-_", b"+/")
_MOST_PERCENT = 1 << 20  # each takes 45 bytes of memory while it is decoded
_SHOWN = 160  # characters of a caller's string in a message


def read_source(image: ImageLike) -> tuple[bytes | Image.Image, str]:
    """The file's bytes or the PIL image, and what to call it in messages. ImageError if there is no such image."""
    if isinstance(image, Image.Image):
        return image, "the PIL image"
    if isinstance(image, np.ndarray):
        return _from_array(image), "the array"
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image), f"the image of {len(image)} bytes"
    if isinstance(image, str):
        return _from_text(image)
    if isinstance(image, PathLike):
        return _read_file(Path(fsdecode(image))), short(fsdecode(image))
    if hasattr(image, "read"):
        return _read_open(image), "the open file"
    raise ImageError(
        f"an image cannot be a {type(image).__name__}; give a path, bytes, an open file, a PIL image, a numpy array, a "
        "data URI or base64"
    )


def short(text: str) -> str:
    """A caller's string for a message: not its whole length, and nothing that a terminal would obey.

    The end stays, which names the file of a path.
    """
    half = _SHOWN // 2
    shown = text if len(text) <= _SHOWN else f"{text[:half]}…{text[-half:]} ({len(text)} characters)"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in shown)


def is_data_uri(text: str) -> bool:
    """Whether a string has the form of a data URI."""
    return text[:5].lower() == "data:"


def is_base64(text: str) -> bool:
    """Whether a string has the form of an image file in base64."""
    return bool(_BASE64_START.match(text) and _BASE64.fullmatch(text))


def from_data_uri(uri: str) -> bytes:
    """data:[type][;any=parameters][;base64],… as browsers read it, percent-encoded too. ImageError for what is none."""
    head, comma, text = uri.partition(",")
    if not comma:
        raise ImageError(f"{short(uri)!r} has no comma; a data URI is data:image/png;base64,…")
    if uri.count("%") > _MOST_PERCENT:
        raise ImageError(f"the data URI has more than {_MOST_PERCENT} percent-encoded bytes; send it as base64")
    body = text.encode(errors="replace")
    if "%" in text:
        body = unquote_to_bytes(body)
    if head.rpartition(";")[2].strip().lower() != "base64":
        return body
    return from_base64(body)


def from_base64(text: str | bytes) -> bytes:
    """Base64 in either alphabet, with or without padding, over any number of lines. ImageError for anything else."""
    try:
        letters = text.encode("ascii") if isinstance(text, str) else text
        letters = letters.translate(_URLSAFE, delete=b" \t\r\n\f\v")
        return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ImageError(f"the image is not valid base64: {str(error)[:80]}") from None


def is_path(text: str) -> bool:
    """Whether a string has the form of a path: of none of the others."""
    text = text.strip()
    return not (is_data_uri(text) or is_base64(text) or text[:5].lower() == "file:" or _SCHEME.match(text))


def _from_text(text: str) -> tuple[bytes, str]:
    stripped = text.strip()
    if not stripped:
        raise ImageError("the image is an empty string; give a path, a data URI or base64")
    if is_data_uri(stripped):
        return from_data_uri(stripped), "the data URI"
    if is_base64(stripped):
        return from_base64(stripped), "the base64 image"
    if stripped[:5].lower() == "file:":
        return _read_file(_path_of(stripped)), short(stripped)
    if _SCHEME.match(stripped):
        raise ImageError(
            f"{short(stripped)} is a URL; nothing is fetched here. Download it and give the file, "
            "its bytes or a data URI"
        )
    return _read_file(Path(text)), short(text)


def _path_of(url: str) -> Path:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ImageError(f"{short(url)} is not a file:// URL: {error}") from None
    if parts.netloc.lower() not in ("", "localhost"):
        raise ImageError(
            f"{short(url)} names a file of the host {short(parts.netloc)}; file:///path is one of this host"
        )
    return Path(url2pathname(parts.path))


def _read_file(path: Path) -> bytes:
    name = short(str(path))
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ImageError(f"{name} is not a file")
        if size > MAX_FILE_BYTES:
            raise ImageError(f"{name} has {size} bytes, at most {MAX_FILE_BYTES} are read; shrink the image")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL, or half a character
        raise ImageError(f"{name} is not a path: {error}") from None


def _read_open(file: Any) -> bytes:
    """All of an open file, from its beginning where it can be wound back, as PIL.Image.open reads one."""
    try:
        if getattr(file, "seekable", bool)():
            file.seek(0)
        content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise ImageError(f"the open file cannot be read: {error}") from None
    if not isinstance(content, bytes | bytearray | memoryview):
        raise ImageError(f'the open file yields {type(content).__name__}, expected bytes; open it with mode "rb"')
    if len(content) > MAX_FILE_BYTES:
        raise ImageError(f"the open file has more than {MAX_FILE_BYTES} bytes, which is the most; shrink the image")
    return bytes(content)


def _from_array(array: "np.ndarray[Any, Any]") -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(
            f"the array is {array.dtype} of shape {array.shape}; expected uint8 of shape (H, W), (H, W, 3) or (H, W, 4)"
        )
    if array.size == 0:
        raise ImageError(f"the array has shape {array.shape}: the image is empty")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
