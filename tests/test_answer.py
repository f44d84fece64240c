"""Answer and Runtime as programs and notebooks use them."""

import io
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
from PIL import Image

import qvl_edge
from qvl_edge import Answer, ConfigError, ImageError, PromptError, QvlError, Runtime
from qvl_edge.answer import Timing, Usage
from qvl_edge.arguments import GenerationArguments, LoadArguments
from qvl_edge.demo import SMALL_MODEL
from qvl_edge.options import GenerationOptions, LoadOptions
from qvl_edge.text.boxes import parse_boxes, plain_text
from qvl_edge.vision.image import Frame, load_image

MARKED = "See <ref>a <b>car</b></ref><box>(0,0),(500,500)</box>."


def make(picture: Image.Image) -> Answer:
    boxes = parse_boxes(MARKED, image_sizes=[picture.size])
    frame = Frame(*picture.size, False)
    return Answer(MARKED, boxes, [1], "stop", Usage(1, 0, 1, 0, 1, 0), Timing(0, 0, 0, 1, 0), None, [frame], [picture])


def test_an_answer_shows_itself() -> None:
    answer = make(Image.new("RGB", (100, 60)))
    assert answer.plain_text == "See a <b>car</b>."
    assert answer.draw().size == (100, 60) and answer.draw().getpixel((50, 15)) == (230, 25, 75)
    shown = answer._repr_html_()
    assert "See a &lt;b&gt;car&lt;/b&gt;." in shown and shown.count("data:image/jpeg;base64,") == 1
    with pytest.raises(ImageError, match="image is 'x', and the question has 1 pictures"):
        answer.draw("x")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="image is 1, and the question has 1 pictures"):
        answer.draw(1)


def test_an_answer_survives_json() -> None:
    answer = make(Image.new("RGB", (100, 60)))
    again = Answer.from_dict(json.loads(json.dumps(answer.to_dict())))
    assert again == answer
    with pytest.raises(ConfigError, match="no answer as"):
        Answer.from_dict({"text": "x"})


@pytest.mark.parametrize("end", range(len(MARKED) + 1))
def test_plain_text_of_an_answer_that_grows_only_grows(end: int) -> None:
    assert plain_text(MARKED).startswith(plain_text(MARKED[:end])), MARKED[:end]


@pytest.mark.parametrize("kind", [lambda data: io.BytesIO(data), lambda data: _Pipe(data)], ids=["file", "pipe"])
def test_an_open_file_is_a_picture(kind) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (7, 5), "red").save(buffer, "PNG")
    given = kind(buffer.getvalue())
    assert load_image(given).size == (7, 5)
    with pytest.raises(ImageError, match='open it with mode "rb"'):
        load_image(io.StringIO("x"))


class _Pipe:
    """Cannot be wound back."""

    def __init__(self, data: bytes):
        self.data = data

    def read(self, size: int = -1) -> bytes:
        return self.data[:size]


@pytest.mark.slow
def test_a_runtime_is_closed_by_with_and_says_so(vit_cache: Path) -> None:
    with Runtime.from_pretrained(SMALL_MODEL, device="cpu", cache_dir=str(vit_cache)) as runtime:
        picture = Image.new("RGB", (40, 40))
        answer = runtime.ask(picture, "What is this?", max_new_tokens=2)
        assert answer.draw().size == (40, 40)
        with pytest.raises(PromptError, match="ask has no image"):
            runtime.ask([], "What is this?")
    runtime.close()  # a second time
    for use in (lambda: runtime.ask(picture, "hi"), lambda: runtime.forget(), lambda: list(runtime.chat_stream("hi"))):
        with pytest.raises(QvlError, match="this Runtime is closed"):
            use()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = runtime.nothing


@pytest.mark.parametrize(("typed", "options"), [(LoadArguments, LoadOptions), (GenerationArguments, GenerationOptions)])
def test_typed_arguments_are_the_options(typed: type, options: type) -> None:
    assert list(get_type_hints(typed)) == [item.name for item in fields(options)]


def test_the_package_lists_its_names() -> None:
    assert set(qvl_edge.__all__) <= set(dir(qvl_edge))
    for method in (Runtime.ask, Runtime.map, Runtime.answer):
        assert len((method.__doc__ or "").splitlines()) > 4


@pytest.mark.slow
def test_a_users_script_passes_mypy_strict_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    good = """from qvl_edge import Answer, Runtime
with Runtime.from_pretrained("BUNDLE", device="cpu", kv_cache="int8") as runtime:
    answer: Answer = runtime.ask(open("a.jpg", "rb"), "Find it.", max_new_tokens=8, stop=["."])
    for one in runtime.map(["a.jpg"], "Find it.", output="x.jsonl", do_sample=False):
        one.draw().save(one.plain_text)
    label: str | None = answer.boxes[0].label
"""
    bad = 'runtime.ask("a.jpg", "hi", max_new_token=8)\nruntime.asks\nRuntime.from_pretrained("B", kv_cache="int3")\n'
    script.write_text(good + bad)
    # the script's types come from these; torch's and the hub's take another 14 s
    settings = "[mypy]\nstrict = true\nfollow_imports = skip\n[mypy-qvl_edge.*,PIL.*]\nfollow_imports = silent\n"
    (tmp_path / "mypy.ini").write_text(settings)
    check = [sys.executable, "-m", "mypy", f"--config-file={tmp_path}/mypy.ini", f"--cache-dir={tmp_path}", str(script)]
    done = subprocess.run(check, capture_output=True, text=True, cwd=Path(qvl_edge.__file__).parent.parent)
    wrong = {int(line) for line in re.findall(r"script\.py:(\d+): error", done.stdout)}
    assert wrong == {7, 8, 9}, done.stdout


@pytest.mark.slow
def test_the_picture_of_the_readme_is_what_the_model_answers_today(vit_cache: Path) -> None:
    from benchmarks.pictures import IMAGES, draw

    with Runtime.from_pretrained(SMALL_MODEL, device="cpu", cache_dir=str(vit_cache)) as runtime:
        made = draw(runtime)
    assert made.tobytes() == Image.open(IMAGES / "answer.png").convert("RGB").tobytes()


def test_the_screenshot_of_the_readme_is_of_todays_page() -> None:
    """Made with: python -m benchmarks.pictures --page."""
    from benchmarks.pictures import IMAGES, page_source

    assert Image.open(IMAGES / "page.png").text["Source"] == page_source()
