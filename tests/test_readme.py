"""What the READMEs tell a user to type works as written, on the small model in the place of the published ones."""

import re
from pathlib import Path

import pytest
from snippets import ROOT, Parsed, Said, Shell, blocks, links, make_home, make_int4_checkpoint

pytestmark = pytest.mark.slow

READMES = (ROOT / "README.md", ROOT / "README_CN.md")


def written(readme: Path, language: str) -> list[str]:
    """The fenced blocks of this language ("" for none)."""
    return [text for found, text in blocks(readme) if found == language]


# these need the network, and the last does not end: tests/test_hub.py and tests/server/test_serve.py run them
ELSEWHERE = [f"qvl-edge {name} Qwen/Qwen-VL-Chat-Int4" for name in ("pull", "chat", "serve")]


def commands() -> list[str]:
    """The shell lines, in their order, without the installation."""
    lines = [line.strip() for block in written(READMES[0], "") for line in block.splitlines()]
    return [line for line in lines if line.startswith(("python -m", "qvl-edge"))]


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
        if line in ELSEWHERE:
            continue
        if "Qwen-VL-Chat-Int4" in line and not (home / "Qwen-VL-Chat-Int4").exists():
            make_int4_checkpoint(home / "BUNDLE", home / "Qwen-VL-Chat-Int4")
        found.append((line, shell(line)))
        assert found[-1][1].code == 0, f"{line}\n{found[-1][1].err}"
    return found


def test_the_commands_run_and_leave_what_they_say(home: Path, said: list[tuple[str, Said]]) -> None:
    assert len(said) == 7
    assert (home / "out.png").exists() and (home / "BUNDLE/vit.onnx").exists()
    answers = [done.out for line, done in said if line.startswith("qvl-edge run")]
    assert len(answers) == 2 and all(answer.strip() for answer in answers)
    # one more export, for the Int4 checkpoint, and it is said
    assert "exporting the vision tower" in said[4][1].err and "exporting" not in said[2][1].err


@pytest.mark.parametrize("line", ELSEWHERE)
def test_the_commands_that_do_not_run_here_are_taken(line: str, home: Path) -> None:
    assert line in commands()
    with pytest.raises(Parsed):
        Shell(home)(line, only_parse=True)


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
