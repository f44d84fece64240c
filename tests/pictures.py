"""Image files that cameras, editors and attackers make and Pillow's writers do not; bytes only."""

import io
import struct
import zlib

from PIL import Image

ORIENTED = (0x112, 3, 1, b"\0\6")  # an orientation of 6: its first row is the right column of what is shown


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG of these rows, each with its filter byte. extra: chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + pixels + chunk(b"IEND", b"")


def grey(extra: bytes = b"") -> bytes:
    """A PNG of 4 x 2 in 8 bits."""
    return png(4, 2, 8, 0, b"\0\x00\x20\x40\x60\0\x80\xa0\xc0\xe0", extra)


def exif(*entries: tuple[int, int, int, bytes], tail: bytes = b"") -> bytes:
    """A block of one directory: (tag, type, count, value or offset)."""
    packed = (struct.pack(">HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    return b"MM\0\x2a\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(packed) + b"\0" * 4 + tail


def exif_bomb(tags: int, size: int) -> bytes:
    """Tags that all have the same `size` bytes, which a reader of each would hold that often; and an orientation."""
    at = struct.pack(">I", 8 + 2 + 12 * (tags + 1) + 4)
    return exif(ORIENTED, *((0xC000 + tag, 7, size, at) for tag in range(tags)), tail=bytes(size))


def jpeg(block: bytes, size: tuple[int, int] = (8, 4)) -> bytes:
    """A JPEG with this EXIF block."""
    plain, segment = encoded(Image.new("RGB", size, "red"), "JPEG"), b"Exif\0\0" + block
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + plain[2:]


def tiff(*entries: tuple[int, int, int, int], tail: bytes = b"") -> bytes:
    """A TIFF of one directory: (tag, type, count, value or offset); `tail` begins at 14 + 12 * len(entries)."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II\x2a\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + b"\0" * 4 + tail


def icon(width: int, height: int, picture: bytes) -> bytes:
    """A Windows icon whose directory says width x height, whatever the picture in it says."""
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", width, height, 0, 0, 1, 32, len(picture), 22) + picture


def repeated_scans(size: tuple[int, int], times: int) -> bytes:
    """A progressive JPEG whose last scan comes `times` more."""
    whole = encoded(Image.new("RGB", size, "gray"), "JPEG", progressive=True)
    return whole[:-2] + whole[whole.rfind(b"\xff\xda") : -2] * times + whole[-2:]
