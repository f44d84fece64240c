"""The code blocks of the documentation, and a folder in which they run: the small model for published ones."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from safetensors.torch import save_file

import qvl_edge.demo
from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.demo.conversations import write_conversations
from qvl_edge.demo.scenes import UNSEEN, make_scene

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


def type_in(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line in `folder`, in a process of its own, with this Python."""
    words = shlex.split(line)
    start = {"python": [sys.executable], "qvl-edge": [sys.executable, "-m", "qvl_edge"]}[words[0]]
    return subprocess.run(
        [*start, *words[1:]],
        cwd=folder,
        env=os.environ | environment(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
