"""TIFF directories, which EXIF blocks are made of too, read without following what a damaged or hostile one says.

Pillow reads every tag of a directory, and each may point at the same bytes: 1,000 tags on 1 MB take 1 GB. And it turns
a TIFF by writing all its metadata anew, which fails on one odd tag. Only the orientation is read here.
"""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

ORIENTATION = 0x112
_DIRECTORIES = (0x8769, 0x8825, 0xA005)  # EXIF, GPS, interoperability: Pillow reads them after the pixels
_UNKNOWN_TAG = 0xFDE8  # private, of nobody
_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)  # bytes of a value, by type
_XMP = re.compile(rb"""tiff:Orientation(?:\s*=\s*["']|>)\s*([1-8])""")
_PREFIXES = re.compile(rb"\A(?:Exif\0\0)+")  # Pillow puts one before a PNG's, which may have one of its own
_HEADER = re.compile(rb"II[*+]\0|MM\0[*+]")


class _Entry(NamedTuple):
    at: int  # where it stands
    tag: int
    nbytes: int  # of its values
    value: int  # the first one, if they fit into the entry
    value_at: int
    form: str  # struct's, of that value


def _entries(block: bytes, start: int = 0) -> Iterator[_Entry]:
    """The entries of the first directory; nothing of what is not one. start: of the header."""
    if not _HEADER.match(block, start):
        return
    order = "<" if block[start : start + 1] == b"I" else ">"
    big = b"+" in block[start + 2 : start + 4]  # BigTIFF
    head, first, number, entry = (16, "Q", "Q", "HHQ") if big else (8, "I", "H", "HHI")
    width = struct.calcsize(order + first)
    step, most = struct.calcsize(order + entry) + width, len(block)
    if start + head > most:
        return
    at = start + struct.unpack_from(order + first, block, start + head - width)[0]
    if at + struct.calcsize(order + number) > most:
        return
    count = struct.unpack_from(order + number, block, at)[0]
    at += struct.calcsize(order + number)
    for place in range(at, min(at + count * step, most - step + 1), step):
        tag, kind, values = struct.unpack_from(order + entry, block, place)
        size = _SIZES[kind] if kind < len(_SIZES) else 0
        form = order + {1: "B", 2: "H", 4: "I"}.get(size, "B")
        value_at = place + step - width
        yield _Entry(place, tag, size * values, struct.unpack_from(form, block, value_at)[0], value_at, form)


def orientation(block: bytes) -> int:
    """Tag 0x112 of an EXIF block, behind any number of "Exif" prefixes; 1 where it is missing or makes no sense."""
    block = _PREFIXES.sub(b"", block, count=1)
    return next((entry.value for entry in _entries(block) if entry.tag == ORIENTATION and 1 <= entry.value <= 8), 1)


def xmp_orientation(packet: bytes) -> int:
    """The orientation of an XMP packet, or 1."""
    found = _XMP.search(packet)
    return int(found[1]) if found else 1


def is_bomb(content: bytes, start: int = 0) -> bool:
    """Whether the directory whose header is at `start` claims more bytes than the file has."""
    return sum(entry.nbytes for entry in _entries(content, start)) > len(content)


def has_bomb(content: bytes) -> bool:
    """Whether any directory in a file does, wherever it is."""
    return any(is_bomb(content, found.start()) for found in _HEADER.finditer(content))


def upright(content: bytes) -> tuple[bytes, int]:
    """A TIFF file as it is stored, for a reader that is to turn nothing and follow nothing; how it has to be turned."""
    changed, turn = bytearray(content), 1
    for entry in _entries(content):
        if entry.tag == ORIENTATION:
            turn = entry.value if 1 <= entry.value <= 8 else 1
            struct.pack_into(entry.form, changed, entry.value_at, 1)
        elif entry.tag in _DIRECTORIES:
            struct.pack_into(entry.form[0] + "H", changed, entry.at, _UNKNOWN_TAG)
    return bytes(changed), turn
