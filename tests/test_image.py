"""Images of every kind become the model's pixels, or a clear refusal."""

import base64
import io
import re
import struct
import zlib
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from conftest import GOLDEN, GOLDEN_MODELS
from pictures import ORIENTED, chunk, encoded, exif, grey, jpeg, png, tiff
from PIL import Image, ImageOps

from qvl_edge.errors import ConfigError, ImageError
from qvl_edge.vision.formats import WEB_FORMATS
from qvl_edge.vision.image import (
    MAX_PIXELS,
    MAX_SIDE,
    MEAN,
    STD,
    Frame,
    content_key,
    load_frame,
    load_image,
    load_picture,
    to_pixels,
)
from qvl_edge.vision.source import MAX_FILE_BYTES


@pytest.mark.parametrize("model", GOLDEN_MODELS)
def test_pixels_equal_upstreams_for_every_mode(model: str) -> None:
    golden = np.load(GOLDEN / model / "golden.npz")
    names = [key.removeprefix("pixels/") for key in golden if key.startswith("pixels/")]
    assert names
    for name in names:
        image = load_image(GOLDEN / model / "images" / name, background="none")
        pixels = to_pixels([image], 448)
        np.testing.assert_array_equal(pixels[0, :, ::9, ::9].numpy(), golden[f"pixels/{name}"])


def test_every_way_of_giving_an_image_gives_the_same_picture(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    content = encoded(image)
    path = tmp_path / "a picture 图.png"
    path.write_bytes(content)
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    given = (path, str(path), content, bytearray(content), uri, image, np.asarray(image))
    assert {content_key(load_image(one)) for one in given} == {content_key(image)}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_modes_are_turned_into_rgb_as_pillow_does(mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 9, 3), dtype=np.uint8)).convert(mode)
    loaded = load_image(image)
    assert loaded.mode == "RGB"
    assert loaded.tobytes() == image.convert("RGB").tobytes()  # all that has alpha is opaque here


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_huge_image_is_refused_by_its_header() -> None:
    with pytest.raises(ImageError, match=rf"10000 x 6401 = 64.0 Mpixel, at most {MAX_PIXELS // 10**6}"):
        load_image(png_header(10000, 6401))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (b"", "empty"),
        (b"no image at all", "not an image that can be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "accepted are JPEG"),
        (encoded(Image.new("RGB", (64, 64)))[:60], "damaged or cut|not an image"),
        ("no/such/file.png", "No such file"),
        ("https://example.com/a.png", "nothing is fetched"),
        ("data:image/png,abc", "not an image that can be read"),
        ("data:image/png;base64,@@@", "not valid base64"),
        (np.zeros((4, 4, 3), dtype=np.float32), "float32"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "empty"),
        (np.zeros((4, 4, 2), dtype=np.uint8), r"\(4, 4, 2\)"),
        (42, "cannot be a int"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(given, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        load_image(given)


def test_a_cut_jpeg_is_an_error_and_not_a_grey_picture() -> None:
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encoded(noise, "JPEG")
    with pytest.raises(ImageError, match="damaged or cut"):
        load_image(content[: len(content) // 2])


def test_a_folder_is_not_an_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="not a file"):
        load_image(tmp_path)


def test_normalization_is_the_written_formula() -> None:
    pixels = to_pixels([Image.new("RGB", (3, 3), (10, 20, 30))], 4)
    expected = [(level / 255 - mean) / std for level, mean, std in zip((10, 20, 30), MEAN, STD, strict=True)]
    np.testing.assert_allclose(pixels[0, :, 2, 1].double().numpy(), expected, rtol=1e-6)


def test_the_page_of_rules_has_the_numbers_and_formats_of_the_code() -> None:
    page = (Path(__file__).parent.parent / "docs/pictures.md").read_text(encoding="utf-8")
    for words in (
        f"{MAX_PIXELS // 10**6} megapixels",
        f"{MAX_SIDE:,} pixels a side",
        f"{MAX_FILE_BYTES >> 20} MB a file",
    ):
        assert words in page
    (listed,) = (line for line in page.splitlines() if line.startswith("| Formats in Python"))
    named = re.findall(r"[A-Z][A-Za-z]+", listed.partition("opens: ")[2])[: len(WEB_FORMATS)]
    assert [name.upper() for name in named] == list(WEB_FORMATS)


# ---------------------------------------------------------------- the square that is kept


def noise(mode: str, size: tuple[int, int] = (500, 301)) -> Image.Image:
    levels = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(levels).convert("RGBA" if "A" in mode else "RGB").convert(mode)


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("size", [(500, 301), (500, 500), (450, 453), (300, 900), (9, 700), (600, 750), (20, 30)])
def test_the_square_is_the_whole_picture_resized_to_the_last_bit(size, orientation: int | None) -> None:
    image = noise("RGB", size)
    if orientation is not None:
        image.getexif()[0x112] = orientation
    picture = load_picture(image, 448, background="none")
    whole = ImageOps.exif_transpose(image).convert("RGB")
    assert picture.square.tobytes() == whole.resize((448, 448), Image.Resampling.BICUBIC).tobytes()
    assert picture.frame == (*whole.size, orientation not in (None, 1))
    assert load_image(image, background="none").tobytes() == whole.tobytes()


@pytest.mark.parametrize("mode", ["1", "P", "I;16", "RGB"])
def test_no_more_than_a_strip_is_ever_rgb(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    rgb = Image.Image.convert

    def convert(image: Image.Image, *arguments, **options) -> Image.Image:
        made.append(image.width * image.height)
        return rgb(image, *arguments, **options)

    content = encoded(Image.new(mode, (3000, 2000)))
    monkeypatch.setattr(Image.Image, "convert", convert)
    picture = load_picture(content, 448)
    assert picture.frame.size == (3000, 2000) and max(made) * 10 < 3000 * 2000


def test_a_picture_stays_as_it_is_and_is_for_one_size() -> None:
    picture = load_picture(noise("RGB"), 448)
    assert load_picture(picture, 448) is picture
    with pytest.raises(ImageError, match="448 pixels wide, the model takes 224"):
        load_picture(picture, 224)


# ---------------------------------------------------------------- orientation


@pytest.mark.parametrize("orientation", [0, 9, "6", 6.0, None])
def test_a_tag_set_by_a_caller_counts_where_it_makes_sense(orientation) -> None:
    image = Image.new("RGB", (4, 2))
    image.getexif()[0x112] = orientation
    assert load_picture(image, 448).frame == ((2, 4, True) if orientation == 6 else (4, 2, False))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_orientation_of_every_container_is_applied(kind: str, orientation: int) -> None:
    tags = Image.Exif()
    tags[0x112] = orientation
    content = encoded(noise("RGB", (40, 20)), kind, exif=tags)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)).convert("RGB"))
    if kind == "TIFF":  # Pillow turns it when it decodes, and convert() keeps the tag
        expected = Image.open(io.BytesIO(content)).convert("RGB")
    assert load_image(content).tobytes() == expected.tobytes()
    assert load_frame(content) == (*expected.size, orientation != 1)


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
HEX = exif(ORIENTED).hex()
RAW_PROFILE = b"Raw profile type exif\0\nexif\n%8d\n%s\n" % (len(HEX) // 2, HEX.encode())
BIAS = struct.pack(">ii", -2, 0)  # a rational that is one by zero, in a directory of its own, as a phone writes it
SAMSUNG = exif(ORIENTED, (0x8769, 4, 1, b"\0\0\0\x26"), tail=exif((0x9204, 10, 1, b"\0\0\0\x38"))[8:] + BIAS)
LATE = grey()[:-12] + chunk(b"eXIf", exif(ORIENTED)) + grey()[-12:]


@pytest.mark.parametrize(
    "content",
    [
        jpeg(exif(ORIENTED, (0x11A, 2, 3, b"72\0")), (4, 2)),  # text where a number belongs
        jpeg(exif((0x10F, 3, 1, b"\0\5"), ORIENTED), (4, 2)),  # a number where text belongs
        jpeg(exif((0x112, 4, 1, b"\0\0\0\6")), (4, 2)),
        jpeg(SAMSUNG, (4, 2)),
        grey(chunk(b"eXIf", exif(ORIENTED))),
        LATE,
        grey(chunk(b"eXIf", b"Exif\0\0" + exif(ORIENTED))),
        grey(chunk(b"tEXt", RAW_PROFILE)),
        grey(chunk(b"zTXt", RAW_PROFILE[:22] + b"\0" + zlib.compress(RAW_PROFILE[22:]))),
        grey(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.encode())),
        encoded(noise("RGB", (4, 2)), "JPEG", xmp=XMP.encode()),
        encoded(noise("RGB", (4, 2)), "WEBP", xmp=XMP.encode()),
        png(4, 2, 16, 0, (b"\0" + b"\1\2" * 4) * 2, chunk(b"eXIf", exif(ORIENTED))),
        encoded(noise("RGB", (4, 2)), "TIFF", exif=exif(ORIENTED, (0x10F, 3, 1, b"\0\5"))),
        encoded(noise("RGB", (4, 2)), "TIFF", exif=exif(ORIENTED), compression="tiff_lzw"),
        encoded(noise("RGB", (4, 2)), "TIFF", exif=exif(ORIENTED), big_tiff=True),
    ],
)
def test_it_is_read_whatever_stands_beside_it(content: bytes) -> None:
    assert load_picture(content, 448).frame == load_frame(content) == Frame(2, 4, True)


@pytest.mark.parametrize(
    "content",
    [
        jpeg(b"\0\x08\0\x02\x01\x12\0\x03", (4, 2)),
        jpeg(exif((0x112, 3, 1, b"\0\x09")), (4, 2)),
        jpeg(exif((0x112, 2, 2, b"6\0")), (4, 2)),
        jpeg(b"MM\0\x2a\xff\xff\xff\xff", (4, 2)),
        grey(chunk(b"eXIf", b"\0\0\x11\0\0\1\4\0")),
        encoded(noise("RGB", (4, 2)), "WEBP", exif=b"garbage!"),
        grey(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n     8\n4d4d002a00000008 (end)\n")),
        grey(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 1_100_000))),  # more than Pillow allows
        grey(chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"x" * 1_100_000))),
        grey(chunk(b"iCCP", b"no profile")),
    ],
)
def test_metadata_that_makes_no_sense_is_no_reason_to_refuse_or_turn_a_picture(content: bytes) -> None:
    assert load_picture(content, 448).frame == (4, 2, False)


# ---------------------------------------------------------------- frames


def test_the_first_frame_of_a_file_is_taken_and_the_second_not_even_parsed() -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    assert load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (
        255,
        0,
        0,
    )
    one = encoded(frames[0], "GIF")[:-1]
    for second in (b"\x2c" + struct.pack("<HHHHB", 0, 0, 4, 4, 0), b"\x21\xf9\1\0\0"):
        assert load_image(one + second).getpixel((0, 0)) == (255, 0, 0)


def test_a_pil_image_that_was_closed_is_an_error_of_its_caller_and_no_damaged_file() -> None:
    image = Image.open(io.BytesIO(CONTENT))
    image.close()
    with pytest.raises(ImageError, match="the PIL image cannot be decoded") as said:
        load_image(image)
    assert "damaged" not in str(said.value)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_a_pil_image_stays_at_the_frame_its_caller_chose(kind: str) -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue", "lime")]
    content = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    image = Image.open(io.BytesIO(content))
    image.seek(1)
    assert load_image(image).getpixel((0, 0)) == (0, 0, 255) and image.tell() == 1
    image.seek(2)
    assert load_picture(image, 448).square.getpixel((9, 9)) == (0, 255, 0) and image.tell() == 2


# ---------------------------------------------------------------- transparency and depth

HALF = Image.fromarray(np.array([[[9, 9, 9, 0], [0, 0, 200, 255]]], dtype=np.uint8))  # a hidden pixel, a shown one


@pytest.mark.parametrize(
    "image",
    [
        HALF,
        encoded(HALF),
        encoded(HALF, "WEBP", lossless=True),
        encoded(HALF.convert("RGB"), "PNG", transparency=(9, 9, 9)),
        encoded(HALF.quantize(4), "PNG"),
        encoded(HALF.convert("RGB").quantize(4), "PNG", transparency=HALF.convert("RGB").quantize(4).getpixel((0, 0))),
        encoded(HALF, "GIF"),
        np.asarray(HALF),
    ],
)
def test_what_is_transparent_is_white_as_its_sender_saw_it(image) -> None:
    assert load_image(image).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(image).getpixel((1, 0)) == (0, 0, 200)
    assert load_image(image, background="#00ff00").getpixel((0, 0)) == (0, 255, 0)


@pytest.mark.parametrize(
    ("content", "hidden"),
    [
        (encoded(Image.new("L", (1, 1), 7), transparency=7), 7),
        (png(1, 1, 16, 0, b"\0\x80\x00", chunk(b"tRNS", b"\x80\x00")), 128),
        (encoded(Image.new("LA", (1, 1), (7, 0))), 7),
        (encoded(Image.new("1", (1, 1), 0), transparency=0), 0),
    ],
)
def test_greys_can_be_transparent_too(content: bytes, hidden: int) -> None:
    assert load_image(content).getpixel((0, 0)) == (255,) * 3
    assert load_image(content, background="none").getpixel((0, 0)) == (hidden,) * 3


def test_a_background_is_a_colour_or_none() -> None:
    for load in (load_image, lambda image, background: load_picture(image, 448, background=background)):
        with pytest.raises(ConfigError, match="'nonsense'; expected a colour"):
            load(HALF, background="nonsense")


def grey_tiff(values: np.ndarray, bits: int, sample: int, white_is_zero: bool = False) -> bytes:
    entries = [(256, values.size), (257, 1), (258, bits), (259, 1), (262, not white_is_zero), (277, 1), (278, 1),
               (279, values.nbytes), (339, sample)]  # fmt: skip
    entries.insert(5, (273, 14 + 12 * 10))
    return tiff(*((tag, 4 if tag in (273, 279) else 3, 1, int(value)) for tag, value in entries), tail=values.tobytes())


def of(*values, dtype) -> np.ndarray:
    return np.array([values], dtype=dtype)


@pytest.mark.parametrize(
    ("image", "levels"),
    [
        (Image.fromarray(of(0, 32768, 65535, dtype=np.uint16)), (0, 128, 255)),
        (encoded(Image.fromarray(of(0, 100, 257, dtype=np.uint16))), (0, 0, 1)),  # dark, and not guessed to be bright
        (Image.fromarray(of(-5, 0, 200, 70000, dtype=np.int32)), (0, 0, 1, 255)),
        (encoded(Image.fromarray(of(0, 200, 65535, dtype=np.int32)), "PPM"), (0, 1, 255)),
        (Image.fromarray(of(-1, 0, 99.6, 255, 300, dtype=np.float32)), (0, 0, 100, 255, 255)),
        (grey_tiff(of(0, 0.5, 1, 2, np.nan, dtype=np.float32), 32, 3), (0, 128, 255, 255, 0)),
        (grey_tiff(of(0, 2**31, 2**32 - 1, dtype=np.uint32), 32, 1), (0, 128, 255)),
        (grey_tiff(of(-9, 0, 2**31 - 1, dtype=np.int32), 32, 2), (0, 0, 255)),
        (grey_tiff(of(-9, 0, 32767, dtype=np.int16), 16, 2), (0, 0, 255)),
        (grey_tiff(of(0, 257, 65535, dtype=np.uint16), 16, 1), (0, 1, 255)),
        (grey_tiff(of(0, 257, 65535, dtype=np.uint16), 16, 1, white_is_zero=True), (255, 254, 0)),
    ],
)
def test_deep_greys_are_scaled_by_their_type_and_never_by_their_maximum(image, levels: tuple[int, ...]) -> None:
    assert [pixel[0] for pixel in np.asarray(load_image(image))[0]] == list(levels)


# ---------------------------------------------------------------- strings

CONTENT = encoded(noise("RGB", (9, 7)))
BASE64 = base64.b64encode(CONTENT).decode()
WRAPPED = "\n".join(BASE64[at : at + 76] for at in range(0, len(BASE64), 76))


@pytest.mark.parametrize(
    "text",
    [
        f"data:image/png;base64,{BASE64}",
        f"DATA:image/png;BASE64,{BASE64}",
        f"data:;base64,{BASE64}",
        f"data:image/png;charset=utf-8;name=a.png;base64,{BASE64}",
        f"data:application/octet-stream; base64,{BASE64}",
        f"data:image/png;base64,\n{WRAPPED}\r\n",
        f" data:image/png;base64,{BASE64}\n",
        f"data:image/png;base64,{BASE64.rstrip('=')}",
        f"data:image/png;base64,{quote(BASE64, safe='')}",
        f"data:image/png;base64,{BASE64.replace('+', '-').replace('/', '_')}",
        f"data:image/png,{quote(CONTENT)}",
        BASE64,
        WRAPPED + "\n",
        BASE64.rstrip("=").replace("+", "-").replace("/", "_"),
    ],
)
def test_a_string_that_holds_a_picture_is_read(text: str) -> None:
    assert load_image(text).tobytes() == noise("RGB", (9, 7)).tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "AVIF"])
def test_base64_of_every_common_format_is_recognized(kind: str) -> None:
    assert load_frame(base64.b64encode(encoded(noise("RGB", (16, 16)), kind)).decode()).size == (16, 16)


def test_a_file_url_names_a_file_of_this_host(tmp_path: Path) -> None:
    path = tmp_path / "a picture 图.png"
    path.write_bytes(CONTENT)
    for url in (path.as_uri(), path.as_uri().replace("file://", "FILE://localhost"), f"file:{quote(str(path))}"):
        assert load_frame(url).size == (9, 7)
    with pytest.raises(ImageError, match="of the host other.example"):
        load_frame(path.as_uri().replace("file://", "file://other.example"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty string"),
        (" \n", "empty string"),
        ("HTTPS://example.org/a.jpg", "is a URL; nothing is fetched"),
        ("s3://bucket/a.jpg", "is a URL; nothing is fetched"),
        ("iVBORw0KGgo" + "A" * 200_000, "the base64 image .*damaged"),
        ("x" * 200_000, r"\(200000 characters\)"),
        ("data:image/png;base64," + "!" * 200_000, "not valid base64"),
        ("data:" + "x" * 200_000, r"no comma"),
        ("data:image/png,%41" + "%41" * 2_000_000, "percent-encoded"),
        ("https://example.org/" + "a" * 200_000, "nothing is fetched"),
        ("\x1b[2Jno.png", r"\\x1b\[2Jno.png cannot be read"),
        ("a\0b.png", "not a path|cannot be read"),
        ("\ud800.png", r"\\ud800.png (is not a path|cannot be read)"),
        ("file://[", "not a file:// URL"),
        ("data:image/png,\ud800%", "not an image that can be read"),
        ("data:image/png;base64,\ud800%", "not valid base64"),
        ("data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
    ],
)
def test_a_string_that_is_no_picture_is_named_in_few_words(text: str, words: str) -> None:
    with pytest.raises(ImageError, match=words) as said:
        load_image(text)
    assert len(str(said.value)) < 400 and str(said.value).isprintable()
