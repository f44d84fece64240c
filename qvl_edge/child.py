"""A command of ours in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def start(module: str, *arguments: str, **options: Any) -> "subprocess.Popen[str]":
    """Start `python -m module`; options are those of subprocess.Popen.

    Nothing is imported from the current folder, which may be a model that somebody else made, with an `export` or an
    `onnx.py` of its own: -P keeps the folder off the search path, and so do the empty entries of PYTHONPATH.
    """
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    search = [str(Path(__file__).parents[1]), *(path for path in inherited if path not in ("", "."))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
    return subprocess.Popen([sys.executable, "-P", "-m", module, *arguments], env=environment, text=True, **options)
