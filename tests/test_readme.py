"""What the READMEs tell a user to type works as written, on the small model in the place of the published ones."""

import re
from pathlib import Path

import pytest
import torch
from snippets import ROOT, Said, Shell, blocks, links, make_home, make_int4_checkpoint

pytestmark = pytest.mark.slow

READMES = (ROOT / "README.md", ROOT / "README_CN.md")


def written(readme: Path, language: str) -> list[str]:
    """The fenced blocks of this language ("" for none)."""
    return [text for found, text in blocks(readme) if found == language]


def commands(*, gpu: bool = False) -> list[str]:
    """The shell lines of the main job, in their order; with `gpu` those that need one."""
    return [
        line.strip()
        for block in written(READMES[0], "")
        for line in block.splitlines()
        if line.startswith(("python -m", "qvl-edge"))
        and not line.startswith("qvl-edge serve")  # does not end; tests/server/test_serve.py runs it
        and gpu == ("--device cuda" in line or "benchmarks.gpu" in line)
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user begins with."""
    folder = tmp_path_factory.mktemp("user")
    make_home(folder)
    return folder


@pytest.fixture(scope="module")
def said(home: Path) -> list[tuple[str, Said]]:
    """The README's commands, run one after another, and what each did."""
    shell, found = Shell(home), []
    for line in commands():
        if "Qwen-VL-Chat-Int4" in line and not (home / "Qwen-VL-Chat-Int4").exists():
            make_int4_checkpoint(home / "BUNDLE", home / "Qwen-VL-Chat-Int4")
        found.append((line, shell(line)))
        assert found[-1][1].code == 0, f"{line}\n{found[-1][1].err}"
    return found


def test_the_commands_run_and_leave_what_they_say(home: Path, said: list[tuple[str, Said]]) -> None:
    assert len(said) == 8
    assert (home / "out.png").exists() and (home / "BUNDLE/vit.onnx").exists()
    answers = [done.out for line, done in said if line.startswith("qvl-edge run")]
    assert len(answers) == 2 and all(answer.strip() for answer in answers)
    # one more export, for the Int4 checkpoint, and it is said
    assert "exporting the vision tower" in said[4][1].err and "exporting" not in said[2][1].err


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the commands would work")
@pytest.mark.usefixtures("said")
def test_without_a_gpu_the_commands_for_one_say_that_there_is_none(home: Path) -> None:
    lines = commands(gpu=True)
    assert len(lines) == 2
    for line in lines:
        done = Shell(home)(line)
        assert done.code != 0 and "CUDA" in done.err, line
        assert "Traceback" not in done.err, line


@pytest.mark.usefixtures("said")
@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.name)
def test_the_python_snippets_run(readme: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    snippets = written(readme, "python")
    assert len(snippets) == 2
    for snippet in snippets:
        exec(compile(snippet, readme.name, "exec"), {})


def test_both_languages_show_the_same_commands() -> None:
    def code_of(readme: Path) -> list[str]:
        parts = written(readme, "") + written(readme, "python")
        return [re.sub(r"\s*#.*", "", part) for part in parts]  # comments are translated

    assert code_of(READMES[0]) == code_of(READMES[1])


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    asked = [line for block in written(READMES[0], "") for line in block.splitlines() if line.startswith("make ")]
    assert asked == ["make demo", "make test"]
    assert all(re.search(rf"^{line.split()[1]}:", makefile, re.M) for line in asked)


def test_links_of_the_readmes_lead_somewhere() -> None:
    for readme in READMES:
        for target in links(readme):
            assert (ROOT / target).exists(), f"{readme.name}: {target}"
