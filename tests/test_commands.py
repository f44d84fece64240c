"""qvl-edge run and chat, as a user types them."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import GOLDEN
from PIL import Image

from quantize import gptq
from qvl_edge.__main__ import main

CHECKPOINT = str(GOLDEN / "tiny-a/checkpoint")
PICTURE = str(GOLDEN / "tiny-a/images/scene0_RGB.png")
SHORT = ["--greedy", "--max-new-tokens", "4"]


@pytest.fixture(autouse=True, scope="module")
def cache(vit_cache: Path):
    """The user's cache folder, so that the vision tower is exported once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(vit_cache.parent))
        yield


@pytest.mark.slow
def test_run_prints_the_answer_on_stdout_and_the_speed_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", CHECKPOINT, "--image", PICTURE, "这是什么?", *SHORT]) == 0
    said = capsys.readouterr()
    assert said.out.strip()
    assert re.search(r"1 images .* prompt 3\d\d tokens .* answer 4 tokens .* finish: length", said.err)


def test_run_json_is_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", CHECKPOINT, "--image", PICTURE, "--image", PICTURE, "hi", "--json", *SHORT]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["usage"]["images"] == 2 and len(answer["token_ids"]) == 4


def test_run_draws_the_latest_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    assert main(["run", CHECKPOINT, "--image", PICTURE, "hi", "--draw", str(out), *SHORT]) == 0
    assert Image.open(out).size == Image.open(PICTURE).size
    assert f"boxes drawn on {out}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "no/such/folder", "hi"], "neither a local folder nor the name of a model"),
        (["run", CHECKPOINT, "hi", "--image", "no-such.png"], "No such file"),
        (["run", CHECKPOINT, "hi", "--draw", "x.png"], "--draw needs an --image"),
        (["run", CHECKPOINT, "hi", "--image", PICTURE, "--draw", "no/folder/x.png"], "does not exist"),
        (["run", CHECKPOINT, "hi", "--max-context", "99999"], "1 to 8192"),
        (["run", CHECKPOINT, "hi", "--top-p", "7"], "top_p is 7, expected a number, more than 0, at most 1"),
        (["run", CHECKPOINT, "hi", "--temperature", "hot"], "temperature is 'hot', expected a number"),
        (["run", CHECKPOINT, "hi", "--seed", str(1 << 64)], "seed is 18446744073709551616, expected an integer"),
        (["chat", CHECKPOINT, "--lookup", "512"], "lookup is 512, expected an integer, 0 to 511"),
        (["serve", CHECKPOINT, "--parallel", "17"], "slots is 17, expected an integer, 1 to 16"),
        (["run", CHECKPOINT, "hi", "--device", "gpu"], "device is 'gpu', expected"),
        (["run", CHECKPOINT, "hi", "--vision-device", "gpu"], "vision_device is 'gpu', expected"),
        (["run", CHECKPOINT, "word " * 9000], "the context holds 8192"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_1(arguments, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert words in said.err and "Traceback" not in said.err and not said.out
    assert "loaded" not in said.err or "the context holds" in words


def test_an_unwritable_picture_format_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out.nonsense"
    assert main(["run", CHECKPOINT, "--image", PICTURE, "hi", "--draw", str(out), *SHORT]) == 1
    assert "unknown file extension" in capsys.readouterr().err


def test_chat_keeps_the_history_and_survives_bad_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["/image no-such.png", f"/image {PICTURE}", "这是什么?", "and now?", "/draw x.png", "/what", "/clear", "hi"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert main(["chat", CHECKPOINT, *SHORT]) == 0
    said = capsys.readouterr()
    assert "No such file" in said.err and "/image FILE" in said.err
    assert "there is no picture, or the last answer has no boxes" in said.err
    prompts = [int(count) for count in re.findall(r"prompt (\d+) tokens", said.err)]
    # the second turn has the first before it; after /clear there is neither picture nor history
    assert len(prompts) == 3 and prompts[1] > prompts[0] > 256 > prompts[2]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    said = capsys.readouterr().out
    assert done.value.code == 0 and all(name in said for name in ("run", "chat", "demo"))


@pytest.fixture(params=[None, {}, {"chat_format": "raw"}], ids=["no file", "no chat_format", "raw"])
def raw_model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A model that generation_config.json does not call a chat model, and what is said about it."""
    folder = tmp_path / "model"
    shutil.copytree(CHECKPOINT, folder)
    file = folder / "generation_config.json"
    file.unlink() if request.param is None else file.write_text(json.dumps(request.param))
    found = (
        "is missing" if request.param is None else f"sets {'chat_format raw' if request.param else 'no chat_format'}"
    )
    return folder, f"{file} {found}, so text is continued"


def test_chat_and_serve_refuse_a_model_that_continues_text_unless_told_otherwise(
    raw_model: tuple[Path, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reason = raw_model
    for command in ("chat", "serve"):
        assert main([command, str(folder)]) == 1
        said = capsys.readouterr().err
        assert reason in said and "--chat-format chatml" in said and "--chat-format raw" in said
        assert "loaded" not in said
    answers = set()
    for given in ("chatml", "raw"):
        monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
        assert main(["chat", str(folder), "--chat-format", given, *SHORT]) == 0
        said = capsys.readouterr()
        assert reason not in said.err
        answers.add(said.out)
    assert len(answers) == 2
    assert main(["run", str(folder), "你好", *SHORT]) == 0
    said = capsys.readouterr()
    assert said.out in answers and reason in said.err


def test_quantizing_says_that_a_model_continues_text(
    raw_model: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, reason = raw_model
    assert gptq.main([str(folder), str(tmp_path / "bundle"), "--round-to-nearest", "--group-size", "32"]) == 0
    assert reason in capsys.readouterr().err


def test_a_chat_format_that_does_not_exist_is_refused_as_it_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(CHECKPOINT, folder)
    (folder / "generation_config.json").write_text('{"chat_format": "llama"}')
    assert main(["run", str(folder), "hi", *SHORT]) == 1
    assert "generation_config.json: chat_format is 'llama', known are 'chatml' and 'raw'" in capsys.readouterr().err


def test_a_warning_is_one_line_of_stderr_and_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(CHECKPOINT, folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert main(["run", str(folder), "hi", *SHORT]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "index.json" in line]
    assert said == [
        f"warning: {folder}: the model is read from model.safetensors; ignored are model.safetensors.index.json"
    ]
