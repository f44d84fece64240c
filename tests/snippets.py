"""The code blocks of the documentation, and a folder in which they run: the small model for published ones."""

import argparse
import importlib
import io
import re
import shlex
import shutil
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import save_file

import qvl_edge.demo
from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.demo.scenes import UNSEEN, make_scene, write_conversations

ROOT = Path(__file__).parent.parent
SMALL = Path(qvl_edge.demo.__file__).parent / "checkpoint"


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block; the language is "" for none."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M)


def links(page: Path) -> list[str]:
    """Targets within the repository, without anchors."""
    return re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8"))


def make_home(folder: Path, *, scenes: int = 4) -> None:
    """What a user has before the first command: a checkpoint, conversations, a picture."""
    (folder / "Qwen-VL-Chat").symlink_to(SMALL)
    assert write_conversations(folder, UNSEEN, scenes).name == "conversations.json"
    make_scene(UNSEEN).image.save(folder / "street.jpg")


def make_int4_checkpoint(bundle: Path, folder: Path) -> None:
    """An Int4 checkpoint as published: the bundle's decoder with the vision tower's float tensors beside it."""
    folder.mkdir()
    for name in ("config.json", "quantize_config.json", "generation_config.json", "qwen.tiktoken"):
        (folder / name).write_bytes((bundle / name).read_bytes())
    source, decoder = Checkpoint(SMALL), Checkpoint(bundle)
    tensors = {name: decoder[name] for name in decoder.names}
    tensors |= {name: source[name] for name in source.names if name.startswith(VISUAL)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def environment(folder: Path) -> dict[str, str]:
    """What a command in `folder` needs to find this package and keep its cache there."""
    return {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}


class Parsed(Exception):
    """The command line was taken."""


class Said(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


class Terminal(io.StringIO):
    """Keeps what is printed, as a terminal that shows every character."""

    encoding = "utf-8"


class Shell:
    """Runs lines of the pages in a folder, in this process: torch is imported once."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, line: str, *, only_parse: bool = False) -> Said:
        """Run the line. only_parse: up to where its arguments are parsed, which raises Parsed."""
        words = shlex.split(line)
        if words[0] == "cp":
            *sources, target = (self.folder / word for word in words[1:])
            for source in sources:
                shutil.copy(source, target)
            return Said(0, "", "")
        name, arguments = ("qvl_edge.__main__", words[1:]) if words[0] == "qvl-edge" else (words[2], words[3:])
        module = importlib.import_module(name)
        if not hasattr(module, "main"):  # a package
            module = importlib.import_module(f"{name}.__main__")
        out, err = Terminal(), Terminal()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(self.folder)
            for variable, value in environment(self.folder).items():
                patch.setenv(variable, value)
            patch.setattr(sys, "argv", [name, *arguments])
            patch.setattr(sys, "stdin", io.StringIO())
            if only_parse:
                patch.setattr(argparse.ArgumentParser, "parse_args", _parse_and_stop)
            try:
                code = module.main() or 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
                print(stop.code, file=sys.stderr)
            except Parsed:
                raise
            except Exception:
                code = 1
                traceback.print_exc()
        return Said(code, out.getvalue(), err.getvalue())


def _parse_and_stop(parser: argparse.ArgumentParser, *given: object, **options: object) -> None:
    parsed, unknown = parser.parse_known_args(*given, **options)
    assert not unknown, f"{parser.prog} does not know {unknown}"
    raise Parsed
