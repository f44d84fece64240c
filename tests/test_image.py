"""Images of every kind become the model's pixels, or a clear refusal."""

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, GOLDEN_MODELS
from PIL import Image

from qvl_edge.errors import ImageError
from qvl_edge.vision.image import MAX_PIXELS, MEAN, STD, content_key, load_image, to_pixels


@pytest.mark.parametrize("model", GOLDEN_MODELS)
def test_pixels_equal_upstreams_for_every_mode(model: str) -> None:
    golden = np.load(GOLDEN / model / "golden.npz")
    names = [key.removeprefix("pixels/") for key in golden if key.startswith("pixels/")]
    assert names
    for name in names:
        pixels = to_pixels([load_image(GOLDEN / model / "images" / name)], 448)
        np.testing.assert_array_equal(pixels[0, :, ::9, ::9].numpy(), golden[f"pixels/{name}"])


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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
    assert loaded.tobytes() == image.convert("RGB").tobytes()


def test_sixteen_bit_grey_is_scaled_instead_of_clipped_to_white(tmp_path: Path) -> None:
    levels = np.array([[0, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert [pixel[0] for pixel in np.asarray(load_image(tmp_path / "deep.png"))[0]] == [0, 128, 255]


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    assert load_image(encoded(image, "JPEG", exif=exif)).size == (2, 4)


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    loaded = load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert loaded.getpixel((0, 0)) == (255, 0, 0)


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_huge_image_is_refused_by_its_header() -> None:
    with pytest.raises(ImageError, match=rf"10000 x 5001 = 50.0 Mpixel, at most {MAX_PIXELS // 10**6}"):
        load_image(png_header(10000, 5001))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (b"", "empty"),
        (b"no image at all", "not an image that can be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "accepted are JPEG"),
        (encoded(Image.new("RGB", (64, 64)))[:60], "damaged or cut|not an image"),
        ("no/such/file.png", "No such file"),
        ("https://example.com/a.png", "nothing is fetched"),
        ("data:image/png,abc", "base64 data URI"),
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
