"""A user's folder in which upstream's snippets run: the published names are folders there, and so are some pictures."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from snippets import SMALL, make_int4_checkpoint

from quantize import gptq
from qvl_edge import Runtime
from qvl_edge.demo.scenes import CELL, Scene, Shape, make_scene

# scenes that were never trained on, and what is on them: make_scene draws and knows it
PICTURES = {"sign.png": 2_100_000_013, "shelf.png": 2_100_000_011}
CAPTION_TOKENS = 19  # of one box; the small model was not taught to stop in raw format


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PICTURES, and the small model as Qwen/Qwen-VL-Chat, as a base model, and as an Int4 checkpoint."""
    folder = tmp_path_factory.mktemp("home")
    for name, seed in PICTURES.items():
        make_scene(seed).image.save(folder / name)
    (folder / "Qwen").mkdir()
    (folder / "Qwen/Qwen-VL-Chat").symlink_to(SMALL)
    shutil.copytree(SMALL, folder / "Qwen/Qwen-VL")
    settings = {"chat_format": "raw", "do_sample": False, "max_new_tokens": CAPTION_TOKENS, "eos_token_id": 4096}
    (folder / "Qwen/Qwen-VL/generation_config.json").write_text(json.dumps(settings))
    assert gptq.main([str(SMALL), str(folder / "int4"), "--round-to-nearest"]) == 0
    make_int4_checkpoint(folder / "int4", folder / "Qwen/Qwen-VL-Chat-Int4")
    return folder


@pytest.fixture
def at_home(home: Path, vit_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run where the snippets' relative paths lead somewhere; what is exported and cached stays there too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(vit_cache.parent))
    monkeypatch.chdir(home)
    yield


@pytest.fixture(scope="session")
def runtime(vit_cache: Path) -> Runtime:
    """The oracle: the small model asked with pictures beside the text, in no snippet's way."""
    return Runtime.from_pretrained(SMALL, device="cpu", cache_dir=vit_cache)


@pytest.fixture(scope="session")
def sign() -> Scene:
    return make_scene(PICTURES["sign.png"])


@pytest.fixture(scope="session")
def shelf() -> Scene:
    return make_scene(PICTURES["shelf.png"])


def pixels_of(shape: Shape) -> tuple[int, ...]:
    """Where it was drawn: x1, y1, x2, y2."""
    return tuple(cell * CELL for cell in shape.cells)


def assert_framed(drawn: Image.Image, plain: Image.Image, shapes: list[Shape]) -> None:
    """Each shape has a line along its four sides, and its middle was left alone."""
    assert drawn.size == plain.size
    changed = ImageChops.difference(drawn.convert("RGB"), plain.convert("RGB")).convert("L").point(lambda v: v and 255)
    for shape in shapes:
        x1, y1, x2, y2 = pixels_of(shape)
        across, down = (x1 + x2) // 2, (y1 + y2) // 2
        for x, y in ((x1, down), (x2, down), (across, y1), (across, y2)):
            assert changed.crop((x - 4, y - 4, x + 4, y + 4)).getbbox() is not None, (shape, x, y)
        assert changed.getpixel((across, down)) == 0, shape
