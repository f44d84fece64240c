"""qvl-edge run and chat, as a user types them."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import GOLDEN
from PIL import Image

from quantize import gptq
from qvl_edge.__main__ import COMMANDS, main, make_parser
from qvl_edge.answer import Answer, Timing, Usage
from qvl_edge.commands import chat, loading, run
from qvl_edge.text.boxes import parse_boxes

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
        (["run", CHECKPOINT, "hi", "--min-new-tokens", "9", "--max-new-tokens", "2"], "min_new_tokens is 9, expected"),
        (["run", CHECKPOINT, "hi", "--image", PICTURE, "--draw", "out.xyz"], "unknown file extension '.xyz'"),
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], "did you mean run"),
        (["run", CHECKPOINT, "hi", "--imge", "x"], "did you mean --image"),
        (
            ["run", CHECKPOINT, "hi", "--image", "a.png", "b.png"],
            "b.png; several values take the option again: --image",
        ),
        (["label", CHECKPOINT], "required: FOLDER, QUESTION"),
    ],
)
def test_a_wrong_word_is_answered_with_the_nearest_one(arguments, words, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2 and words in capsys.readouterr().err


def test_every_help_has_examples_that_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Exit codes" in capsys.readouterr().out
    for name, parser in zip(COMMANDS, make_parser().commands, strict=True):
        lines = re.findall(r"qvl-edge (\w+)([^|>\n)]*)", parser.epilog)
        assert lines, name
        for command, rest in lines:
            make_parser().parse_args([command, *shlex.split(rest, comments=True)])


def test_a_reader_that_ends_early_is_no_traceback() -> None:
    line = f"{sys.executable} -m qvl_edge fit Qwen/Qwen-VL-Chat-Int4 --gpu 12 | true"
    done = subprocess.run(["bash", "-c", f"{line}; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert done.stdout.strip() in ("0", "141") and "Traceback" not in done.stderr and "rror" not in done.stderr


@pytest.mark.parametrize("encoding", ["gbk", "latin-1", "ascii"])
def test_a_terminal_without_some_letters_is_no_traceback(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    monkeypatch.setattr("sys.stdout", out)
    assert main(["fit", "Qwen/Qwen-VL-Chat-Int4", "--gpu", "12", "--json"]) == 0
    assert main(["fit", "Qwen/Qwen-VL-Chat-Int4", "--gpu", "12GiB"]) == 0
    text = out.buffer.getvalue().decode(encoding) if out.flush() is None else ""
    assert json.loads(text.splitlines()[0])["memory"] == 12 * 10**9
    assert "\\u" not in text.split("\n", 1)[1]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'onnxruntime.x'", name="onnxruntime.x")

    monkeypatch.setattr("qvl_edge.commands.loading.load", missing)
    assert main(["run", CHECKPOINT, "hi"]) == 1
    assert (
        "the package onnxruntime is not installed; install qvl-edge[cpu] or qvl-edge[cuda]" in capsys.readouterr().err
    )


@pytest.mark.parametrize("variable", ["", "1"])
def test_no_color_is_heeded(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", variable)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert loading.colourful() == (not variable)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def scripted(*pieces: str) -> SimpleNamespace:
    """A runtime that says `pieces`."""
    text = "".join(pieces)
    usage, timing = Usage(1, 0, 1, 0, 1, 0), Timing(0, 0, 0, 1, 0)
    answer = Answer(text, parse_boxes(text, image_sizes=[(100, 50)]), [1], "stop", usage, timing)
    return SimpleNamespace(answer_stream=lambda *_, **__: iter([*pieces, answer]))


def test_a_terminal_gets_the_answer_without_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    said = Terminal()
    monkeypatch.setattr("sys.stdout", said)
    run.stream(scripted("A <re", "f>red ", "car</ref><bo", "x>(0,0),(500,1000)</box> and 1 <", " 2"), [], plain=True)
    assert said.getvalue() == "A red car and 1 < 2\n  red car: 0, 0, 50, 50\n"


def test_pictures_and_questions_come_from_stdin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    answer = SimpleNamespace(to_dict=lambda: {}, usage=Usage(1, 0, 1, 0, 1, 0), timing=Timing(0, 0, 0, 1, 0))
    answer.finish_reason = "stop"
    runtime = SimpleNamespace(answer=lambda query, **_: asked.append(query) or answer)
    monkeypatch.setattr(loading, "load", lambda *_: runtime)
    content = Path(PICTURE).read_bytes()
    for words in (["hi", "--image", "-"], ["-", PICTURE], ["hi", PICTURE, PICTURE]):
        data = content if "--image" in words else b"question?\n"
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert main(["run", CHECKPOINT, *words, "--json"]) == 0
    first, second, third = asked
    assert first == [{"image": content}, {"text": "hi"}]
    assert second == [{"image": PICTURE}, {"text": "question?"}] and len(third) == 3
    assert main(["run", CHECKPOINT, "-", "--image", "-"]) == 1


@pytest.mark.slow
def test_each_picture_has_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("no picture")
    asked = ["run", CHECKPOINT, "hi", PICTURE, str(tmp_path / "no.png"), PICTURE, "--each", *SHORT]
    assert main(asked) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == asked[3:6] and "error" in rows[1] and rows[0]["text"] == rows[2]["text"]


@pytest.mark.slow
def test_chat_asks_about_a_region_over_several_lines_and_quoted_files(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "a picture.png"
    Image.new("RGB", (200, 100)).save(file)
    lines = ["/box 1 2 3 4", f"/image '{file}'", "/box 20 10 100 50", '"""what is', 'at {box}?"""', "/box 9 9 1 1"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, "/history", "/exit", "never"]) + "\n"))
    assert main(["chat", CHECKPOINT, *SHORT]) == 0
    said = capsys.readouterr()
    assert "what is\nat <box>(100,100),(500,500)</box>?" in said.out and "never" not in said.out
    assert "there is no picture to put a box on" in said.err and "is not within the picture" in said.err


def test_ctrl_c_stops_the_answer_and_not_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object):
        yield "begun"
        raise KeyboardInterrupt

    runtime = scripted("fine")
    talk = chat.Chat(runtime, {}, ["a.png"], plain=False)
    good, runtime.answer_stream = runtime.answer_stream, stopped
    assert talk.obey("one") and not talk.history and talk.pictures == ["a.png"]
    runtime.answer_stream = good
    assert talk.obey("two") and len(talk.history) == 1 and not talk.pictures


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_option(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS) and "12g" in script
    if shell == "bash":
        lines = f'{script}\nCOMP_WORDS=(qvl-edge run --prof); COMP_CWORD=2; _qvl_edge; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True)
        assert done.stdout.strip() == "--profile", done.stderr
