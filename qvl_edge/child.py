"""A command of ours in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def start(module: str, *arguments: str, **options: Any) -> "subprocess.Popen[str]":
    """Start `python -m module`; options are those of subprocess.Popen. What goes through pipes is UTF-8, whatever the
    system's encoding is: a schema may have words that a Windows code page lacks.

    Nothing is imported from the current folder, which may be a model that somebody else made, with an `export` or an
    `onnx.py` of its own: -P keeps the folder off the search path, and so do the empty entries of PYTHONPATH.
    """
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    search = [str(Path(__file__).parents[1]), *(path for path in inherited if path not in ("", "."))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
    if subprocess.PIPE in options.values():
        environment["PYTHONIOENCODING"] = "utf-8"
    command = [sys.executable, "-P", "-m", module, *arguments]
    return subprocess.Popen(command, env=environment, encoding="utf-8", errors="replace", **options)


def limit(most_bytes: int, seconds: int | None = None) -> None:
    """Bound the process that this runs in: its address space, its processor time, and after the answers in priority.

    On Windows nothing is bounded; whoever started it ends it in time.
    """
    try:
        import resource
    except ImportError:
        return
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if seconds is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
