"""The examples run as they stand, and stay short enough to read at once."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from examples import ask, openai_client
from qvl_edge.demo.scenes import UNSEEN, make_scene

ROOT = Path(__file__).parent.parent
SHAPES = make_scene(UNSEEN).shapes


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, vit_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(vit_cache.parent))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    make_scene(UNSEEN).image.save("street.png")


def test_each_is_under_forty_lines() -> None:
    for file in (ROOT / "examples").glob("*.py"):
        assert len(file.read_text().splitlines()) < 40, file.name


@pytest.mark.parametrize("arguments", [[], [str(ask.SMALL_MODEL), "street.png"]])
@pytest.mark.slow
def test_asking_names_the_shapes_and_draws_them(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    ask.main(*arguments)
    output = capsys.readouterr().out
    assert all(f"{shape.name('en')} (" in output for shape in SHAPES)
    assert f"\n{len(SHAPES)}\nUsage(" in output
    assert Image.open("boxes.png").size == make_scene(UNSEEN).image.size


@pytest.fixture
def server_url() -> Iterator[str]:
    """Of `qvl-edge serve` with the small model."""
    command = [sys.executable, "-m", "qvl_edge", "serve", str(ask.SMALL_MODEL), "--cpu-only", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = []
            while not lines or "startup complete" not in lines[-1]:
                lines.append(process.stderr.readline())
                assert lines[-1], "".join(lines)
            yield re.findall(r"API (http://\S+)", "".join(lines))[0]
        finally:
            process.terminate()
            process.stderr.read()


@pytest.mark.slow
def test_openais_client_streams_the_answer_and_its_boxes(server_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    openai_client.main("street.png", server_url)
    output = capsys.readouterr().out
    assert output.startswith("<ref>") and all(f"\n {shape.name('en')} [" in output for shape in SHAPES)
