"""What the READMEs tell a user to type works as written, on the small model in the place of the published ones."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import qvl_edge.demo
from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.demo.conversations import write_conversations
from qvl_edge.demo.scenes import UNSEEN, make_scene

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README_CN.md")
SMALL = Path(qvl_edge.demo.__file__).parent / "checkpoint"


def blocks(readme: str, language: str) -> list[str]:
    """The fenced blocks of this language ("" for none)."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / readme).read_text(encoding="utf-8"), re.S | re.M)
    return [text for found, text in fenced if found == language]


def commands(*, gpu: bool = False) -> list[str]:
    """The shell lines of the main job, in their order; with `gpu` those that need one."""
    return [
        line.strip()
        for block in blocks(READMES[0], "")
        for line in block.splitlines()
        if line.startswith(("python -m", "qvl-edge"))
        and not line.startswith("qvl-edge serve")  # does not end; tests/server/test_serve.py runs it
        and gpu == ("--device cuda" in line or "benchmarks.gpu" in line)
    ]


def type_in(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of the README in `folder`, with this Python."""
    words = shlex.split(line)
    start = {"python": [sys.executable], "qvl-edge": [sys.executable, "-m", "qvl_edge"]}[words[0]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(
        [*start, *words[1:]], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def make_int4_checkpoint(bundle: Path, folder: Path) -> None:
    """An Int4 checkpoint as published: the bundle's decoder with the vision tower's float tensors beside it."""
    folder.mkdir()
    for name in ("config.json", "quantize_config.json", "generation_config.json", "qwen.tiktoken"):
        (folder / name).write_bytes((bundle / name).read_bytes())
    source, decoder = Checkpoint(SMALL), Checkpoint(bundle)
    tensors = {name: decoder[name] for name in decoder.names}
    tensors |= {name: source[name] for name in source.names if name.startswith(VISUAL)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's commands have been run, one after another."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "Qwen-VL-Chat").symlink_to(SMALL)
    conversations = write_conversations(folder, UNSEEN, 4)
    assert conversations.name == "conversations.json"
    make_scene(UNSEEN).image.save(folder / "street.jpg")
    for line in commands():
        if "Qwen-VL-Chat-Int4" in line and not (folder / "Qwen-VL-Chat-Int4").exists():
            make_int4_checkpoint(folder / "BUNDLE", folder / "Qwen-VL-Chat-Int4")
        done = type_in(line, folder)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        (folder / f"{len(list(folder.glob('*.said')))}.said").write_text(json.dumps([line, done.stdout, done.stderr]))
    return folder


def test_the_commands_run_and_leave_what_they_say(home: Path) -> None:
    said = [json.loads((home / f"{n}.said").read_text()) for n in range(len(list(home.glob("*.said"))))]
    assert len(said) == 7
    assert (home / "out.png").exists() and (home / "BUNDLE/vit.onnx").exists()
    answers = [out for line, out, _ in said if line.startswith("qvl-edge run")]
    assert len(answers) == 2 and all(answer.strip() for answer in answers)
    # one more export, for the Int4 checkpoint, and it is said
    assert "exporting the vision tower" in said[4][2] and "exporting" not in said[2][2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the commands would work")
def test_without_a_gpu_the_commands_for_one_say_that_there_is_none(home: Path) -> None:
    lines = commands(gpu=True)
    assert len(lines) == 2
    for line in lines:
        done = type_in(line, home)
        assert done.returncode != 0 and "CUDA" in done.stderr, line
        assert "Traceback" not in done.stderr, line


@pytest.mark.parametrize("readme", READMES)
def test_the_python_snippets_run(readme: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    snippets = blocks(readme, "python")
    assert len(snippets) == 2
    for snippet in snippets:
        exec(compile(snippet, readme, "exec"), {})


def test_both_languages_show_the_same_commands() -> None:
    def code_of(readme: str) -> list[str]:
        parts = blocks(readme, "") + blocks(readme, "python")
        return [re.sub(r"\s*#.*", "", part) for part in parts]  # comments are translated

    assert code_of(READMES[0]) == code_of(READMES[1])


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    asked = [line for block in blocks(READMES[0], "") for line in block.splitlines() if line.startswith("make ")]
    assert asked == ["make demo", "make test"]
    assert all(re.search(rf"^{line.split()[1]}:", makefile, re.M) for line in asked)


def test_links_of_the_readmes_lead_somewhere() -> None:
    for readme in READMES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / readme).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{readme}: {target}"
