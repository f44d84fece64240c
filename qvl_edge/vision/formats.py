"""Which formats of image files are read, what a file of another one is called, and the way out for it."""

import functools
import importlib
import re
import struct
import zlib
from collections.abc import Iterator

from PIL import Image, features

from qvl_edge.errors import ImageError
from qvl_edge.vision.tiff import has_bomb, is_bomb

WEB_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF", "ICO")
"""What a server takes: read here first too, so that no other reader of Pillow ever gets such a file."""
HEIF = "HEIF"
_NEVER = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow has Ghostscript run an EPS, and knows the others by name only

_PNG = b"\x89PNG\r\n\x1a\n"
_ICO = b"\0\0\1\0"
_ORIENTED_TEXT = re.compile(rb"(?:XML:com\.adobe\.xmp|Raw profile type (?:exif|APP1))\0")
_MOST_TEXT = 64 << 10  # bytes of a PNG's text that may hold an orientation; the rest of its texts is left out
_MOST_PARTS = 100_000  # chunks of a PNG; segments of a JPEG before its pixels, a tenth: each takes Pillow 5 us
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

_OTHERS = (  # how a file that is none of Pillow's begins, what it is, and what to do
    (re.compile(rb"\s*(?:<\?xml[^>]*>\s*|<!--.*?-->\s*|<!DOCTYPE svg[^>]*>\s*)*<svg\b", re.I | re.S),
     "an SVG drawing; render it to PNG first"),
    (re.compile(rb"\s*(?:<!--.*?-->\s*)*<(?:!doctype )?html", re.I | re.S),
     "an HTML page; it was probably saved in place of the picture"),
    (re.compile(rb"%PDF-"), "a PDF document; render the page to PNG first"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "a PostScript drawing (EPS); render it to PNG first"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "a JPEG XL picture; save it as JPEG or PNG"),
    (re.compile(rb"FUJIFILMCCD-RAW|IIU\0|IIRO|MMOR|II\x1a\0\0\0HEAPCCDR|....ftypcrx ", re.S),
     "a camera's raw file; develop it to JPEG or PNG"),
    (re.compile(rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI |\0\0\x01\xba", re.S),
     "a video; save one of its frames as a picture"),
    (re.compile(rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!"), "an archive; unpack the picture first"),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer in place of the file; fetch it with: git lfs pull"),
    (re.compile(rb"\s*data:", re.I), "the text of a data URI; give it as a string"),
)  # fmt: skip
_READ = (  # and how one of ours begins
    (b"\xff\xd8\xff", "JPEG"), (_PNG, "PNG"), (b"GIF8", "GIF"), (b"BM", "BMP"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"), (b"MM\0+", "TIFF"), (_ICO, "ICO"),
)  # fmt: skip


def served_formats() -> tuple[str, ...]:
    """WEB_FORMATS that can be read here, and HEIF where pillow-heif is installed."""
    formats = tuple(name for name in WEB_FORMATS if name != "AVIF" or features.check("avif"))
    return (*formats, HEIF) if _has_heif() else formats


def readers(content: bytes) -> Iterator[tuple[str, ...]]:
    """Pillow's formats to try on a file, group after group. ImageError if its own reader is not installed."""
    kind = _iso_kind(content)
    if kind == HEIF:
        if not _has_heif():
            raise ImageError("is a HEIC picture; install its reader (pip install pillow-heif), or save it as JPEG")
        yield (HEIF,)
        return
    if kind == "AVIF" and not features.check("avif"):
        raise ImageError(
            "is an AVIF picture, which this Pillow does not read; install pillow>=11.3, or save it as JPEG"
        )
    Image.init()
    yield tuple(name for name in WEB_FORMATS if name in Image.OPEN)
    yield tuple(name for name in Image.ID if name not in _NEVER and name not in WEB_FORMATS)


def name_of(content: bytes) -> str | None:
    """The format of WEB_FORMATS that a file's first bytes promise."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    return _iso_kind(content) or next((name for start, name in _READ if content.startswith(start)), None)


def unreadable(content: bytes, accepted: tuple[str, ...]) -> str:
    """Why a file is none of the accepted formats."""
    if name := name_of(content):
        if name not in accepted:
            return f"is a {name} picture, which is not accepted here; save it as JPEG or PNG"
        return f"begins as a {name} picture, but is none that can be read; save it as PNG or JPEG"
    what = next((words for pattern, words in _OTHERS if pattern.match(content[:4096])), None)
    return f"is {what or 'not an image that can be read'}; accepted are {', '.join(accepted)}"


def check_before_opening(content: bytes) -> None:
    """ImageError for a file that would be dear before its size is known: Pillow's readers trust these."""
    kind = name_of(content)
    if kind == "TIFF" and is_bomb(content) or kind in ("AVIF", HEIF) and has_bomb(content):
        raise ImageError("has metadata that claims more bytes than the file has; it is damaged")
    if kind == "JPEG" and any(number > _MOST_PARTS // 10 for number, _ in enumerate(_jpeg_segments(content))):
        raise ImageError(f"has more than {_MOST_PARTS // 10} segments before its pixels; save it again")


def _jpeg_segments(content: bytes) -> Iterator[int]:
    """Where each segment before the first scan begins."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != 0xDA:
        yield at
        at += 2 + int.from_bytes(content[at + 2 : at + 4]) if content[at + 1] != 0xFF else 1


def inner_sizes(content: bytes) -> Iterator[tuple[int, int]]:
    """The sizes of the pictures in an icon, as each of them says itself: Pillow decodes one when the file is opened."""
    if content[:4] != _ICO or len(content) < 6:
        return
    for at in range(6, min(6 + 16 * struct.unpack_from("<H", content, 4)[0], len(content) - 15), 16):
        start = struct.unpack_from("<I", content, at + 12)[0]
        head = content[start : start + 24]
        if len(head) == 24:
            if head.startswith(_PNG):
                yield struct.unpack_from(">II", head, 16)
            else:  # a bitmap, which says its own height and the mask's
                width, height = struct.unpack_from("<II", head, 4)
                yield width, height // 2


def essential_png(content: bytes) -> bytes:
    """A PNG with the chunks that pixels and orientation are made of, those that are not pixels first.

    Pillow refuses a picture for a text or a colour profile of more than 1 MB. ImageError for a flood of chunks.
    """
    first, pixels = [_PNG], list[bytes]()
    at, kind = len(_PNG), b""
    for _ in range(_MOST_PARTS):
        if at + 8 > len(content) or kind == b"IEND":
            return b"".join(first + pixels)
        size, kind = struct.unpack_from(">I4s", content, at)
        chunk, at = slice(at, at + 12 + size), at + 12 + size
        if kind in (b"IDAT", b"IEND"):
            pixels.append(content[chunk])
        elif not kind[0] & 32 or kind == b"tRNS":  # a capital letter: the pixels need it
            first.append(content[chunk])
        elif kind == b"eXIf" or size <= _MOST_TEXT and _ORIENTED_TEXT.match(content, chunk.start + 8):
            found = content[chunk]
            if zlib.crc32(found[4:-4]) == int.from_bytes(found[-4:]):
                first.append(found)
    raise ImageError(f"has more than {_MOST_PARTS} chunks; save it again")


def _iso_kind(content: bytes) -> str | None:
    """HEIF, AVIF or neither, by the brands of an ISO media file."""
    if content[4:8] != b"ftyp":
        return None
    brands = content[8 : min(int.from_bytes(content[:4]), 256)]
    if b"avif" in brands or b"avis" in brands:
        return "AVIF"
    return HEIF if brands[:4] in _HEIF_BRANDS else None


@functools.cache
def _has_heif() -> bool:
    try:
        importlib.import_module("pillow_heif").register_heif_opener(thumbnails=False)
    except ImportError:
        return False
    return True
