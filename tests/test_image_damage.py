"""Damaged, hostile and foreign files: an ImageError that says what it is and what to do, and that costs little."""

import importlib.util
import io
import random
import struct
import threading
import tracemalloc
import warnings

import numpy as np
import pytest
from pictures import chunk, encoded, exif_bomb, grey, icon, jpeg, png, repeated_scans, tiff
from PIL import Image, ImageFile

from qvl_edge.errors import ImageError
from qvl_edge.vision import image as module
from qvl_edge.vision.formats import served_formats
from qvl_edge.vision.image import MAX_SIDE, load_frame, load_image, load_picture

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100
MODES = {
    "JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "P", "LA", "RGBA", "1", "I;16"), "WEBP": ("RGB", "RGBA"),
    "GIF": ("P",), "BMP": ("RGB", "P", "1"), "AVIF": ("RGB", "RGBA"), "TIFF": ("RGB", "P", "I;16", "F", "CMYK"),
    "ICO": ("RGBA",), "PPM": ("RGB", "1"), "TGA": ("RGB",), "JPEG2000": ("RGB",), "PCX": ("P",), "DDS": ("RGB",),
}  # fmt: skip


def seeds() -> list[bytes]:
    """Small files of all formats and modes, some with metadata, frames and scans."""
    tags = Image.Exif()
    tags[0x112], tags[0x11A] = 6, 72.0
    found = [repeated_scans((24, 40), 1), encoded(NOISE, "GIF", save_all=True, append_images=[NOISE.rotate(9)])]
    found += [encoded(NOISE, "TIFF", compression=how) for how in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")]
    for kind, modes in MODES.items():
        options = {"exif": tags} if kind in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF") else {}
        for mode in modes:
            deep = Image.fromarray(np.asarray(NOISE.convert("L")).astype(np.uint16) * 257)
            found.append(encoded(deep if mode == "I;16" else NOISE.convert(mode), kind, **options))
    return found


def mutated(content: bytes, chance: random.Random) -> bytes:
    """With a few bytes changed, cut out, doubled or cut off."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(min(len(changed), chance.choice((120, len(changed)))))
        extreme = chance.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\1"))
        how = chance.randrange(6)
        if how < 2:
            changed[at] = chance.randrange(256)
        elif how == 2:
            changed[at : at + 4] = extreme
        elif how == 3:
            del changed[at : at + chance.randrange(1, 40)]
        elif how == 4:
            changed[at:at] = changed[at : at + chance.randrange(1, 60)]
        else:
            changed[at] ^= 1 << chance.randrange(8)
        changed = changed or bytearray(b"x")
    return bytes(changed[: chance.randrange(1, len(changed) + 1)] if chance.random() < 0.1 else changed)


def test_nothing_but_an_image_error_comes_of_any_mutation(capfd) -> None:
    chance, files = random.Random(20261128), seeds()
    read = 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(25 * len(files)):
            try:
                load_picture(mutated(chance.choice(files), chance), 32)
                read += 1
            except ImageError as error:
                assert len(str(error)) < 500
    assert 100 < read < 24 * len(files)  # neither all harmless nor all lost in the first bytes
    assert not [one for one in seen if "PIL" in one.filename] and not capfd.readouterr().err


# ---------------------------------------------------------------- what it may cost


ELSEWHERE = 14 + 12 * 10  # where the values of a TIFF with ten entries begin
TILE = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 5), (262, 3, 1, 1), (277, 3, 1, 1),
        (322, 4, 1, 65520), (323, 4, 1, 65520), (324, 4, 1, ELSEWHERE), (325, 4, 1, 100)]  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        grey(chunk(b"eXIf", exif_bomb(1000, 1_000_000))),
        jpeg(exif_bomb(2000, 40_000)),
        encoded(NOISE, "WEBP", exif=exif_bomb(1000, 1_000_000)),
    ],
)
def test_metadata_that_points_at_the_same_bytes_is_not_read_for_each_tag(content: bytes) -> None:
    tracemalloc.start()
    try:
        load_picture(content, 32)
        assert tracemalloc.get_traced_memory()[1] < 120_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (tiff(*[(0xC000 + tag, 7, 900_000, 8) for tag in range(9)], tail=bytes(1_000_000)), "more bytes than the file"),
        (tiff(*TILE, tail=bytes(100)), "cannot be decoded"),
        (png(20000, 14000, 1, 0, b""), "280.0 Mpixel, at most 64"),
        (png(1, MAX_SIDE + 1, 8, 0, b""), f"1 x {MAX_SIDE + 1}, at most {MAX_SIDE} pixels a side"),
        (icon(16, 16, png(20000, 8000, 1, 0, b"")), "20000 x 8000 = 160.0 Mpixel, at most 64"),
        (icon(16, 16, struct.pack("<IiiHH", 40, 20000, 16000, 1, 1) + bytes(24)), "20000 x 8000 = 160.0 Mpixel"),
        (repeated_scans((4000, 4000), 100), "16.0 Mpixel in 110 scans"),
        (repeated_scans((16, 16), 2000), "in 2010 scans"),
        (encoded(NOISE)[:33] + chunk(b"teSt", b"") * 100_001 + encoded(NOISE)[33:], "more than 100000 chunks"),
        (b"\xff\xd8" + b"\xff\xfe\0\2" * 10_002 + encoded(NOISE, "JPEG")[2:], "more than 10000 segments"),
    ],
)  # fmt: skip
def test_what_would_take_long_or_much_is_refused_before_it_is_decoded(
    content: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "cannot" not in words:
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match=words):
        load_picture(content, 32)


def test_scans_of_a_camera_are_read() -> None:
    assert load_frame(repeated_scans((4000, 3000), 0)).size == (4000, 3000)


def test_a_caller_hears_nothing_of_pillows_warnings_and_keeps_its_own() -> None:
    content = jpeg(b"MM\0\x2a\0\0\0\x08" + struct.pack(">H", 5000) + struct.pack(">HHII", 0x10F, 2, 9, 1 << 30) * 5000)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        load_image(content)
        warnings.warn("its own", stacklevel=1)
    assert [str(one.message) for one in seen] == ["its own"]


# ---------------------------------------------------------------- what it is called


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<?xml version='1.0'?>\n<!-- x -->\n<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing; render"),
        (b"\n<!DOCTYPE html><html>", "an HTML page"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "PostScript"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JPEG XL"),
        (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(50), "a video"),
        (b"PK\3\4" + bytes(50), "an archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"data:image/png;base64,iVBORw0KGgo=", "give it as a string"),
        (b"GIF89a\1", "damaged or cut"),
        (b"RIFF\x10\0\0\0WEBPVP8 \4\0\0\0", "damaged or cut|WEBP"),
        (encoded(NOISE)[:-300], "damaged or cut"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "not an image that can be read; accepted are"),
        (b"no image at all", "accepted are JPEG, PNG, WEBP, GIF, BMP"),
    ],
)
def test_a_file_that_is_none_is_named_with_the_way_out(content: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        load_image(content)


WMF = struct.pack("<IHhhhhHIH", 0x9AC6CDD7, 0, 0, 0, 100, 100, 72, 0, 0) + b"\1\0\x09\0" + bytes(50)


def bmp_of_ten_bits() -> bytes:
    """As browsers show it and Pillow does not."""
    masks = (0x3FF << 20, 0x3FF << 10, 0x3FF)
    header = struct.pack("<IiiHHIIiiII", 40, 4, 2, 1, 32, 3, 32, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 98, 0, 0, 66) + header + struct.pack("<III", *masks) + bytes(32)


TWELVE_BITS = encoded(NOISE, "JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c")
KINDS_OF_TIFF = [
    tiff(
        (256, 4, 1, 1),
        (257, 4, 1, 1),
        (258, 3, 1, 8),
        (259, 3, 1, compression),
        (262, 3, 1, photometric),
        (277, 3, 1, 1),
    )
    for compression, photometric in ((34712, 1), (1, 32803))  # JPEG 2000, and a camera's mosaic
]


@pytest.mark.parametrize("content", [bmp_of_ten_bits(), WMF, TWELVE_BITS, *KINDS_OF_TIFF])
def test_a_healthy_file_of_an_unsupported_kind_is_not_called_damaged(content: bytes) -> None:
    with pytest.raises(ImageError, match="save it as") as said:
        load_image(content)
    assert "damaged" not in str(said.value)


@pytest.mark.parametrize("kind", ["TIFF", "AVIF", "ICO", "JPEG2000", "PPM", "TGA", "PCX", "SGI", "DDS", "QOI"])
def test_whatever_pillow_opens_is_read(kind: str) -> None:
    image = NOISE.resize((32, 32))
    assert load_image(encoded(image, kind)).size == (32, 32)
    if kind not in served_formats():
        with pytest.raises(ImageError, match="accepted are JPEG"):
            load_picture(encoded(image, kind), 32, accepted=served_formats())


@pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is not None, reason="pillow-heif is installed")
def test_heic_is_named_with_its_reader() -> None:
    with pytest.raises(ImageError, match="HEIC picture; install its reader .pip install pillow-heif"):
        load_image(HEIC)
    assert "HEIF" not in served_formats()


def test_heic_is_read_where_its_reader_is() -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    content = encoded(Image.new("RGB", (64, 32), "red"), "HEIF")
    assert load_frame(content, served_formats()) == (64, 32, False)


def test_postscript_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(content)).format == "EPS"  # Pillow would
    with pytest.raises(ImageError, match="PostScript"):
        load_image(content)


def test_one_picture_is_decoded_at_a_time() -> None:
    with module._opened(NOISE):
        assert not _taken_by_another_thread()
    assert _taken_by_another_thread()


def _taken_by_another_thread() -> bool:
    got: list[bool] = []

    def take() -> None:
        got.append(module._DECODING.acquire(blocking=False))
        if got[0]:
            module._DECODING.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return got[0]
