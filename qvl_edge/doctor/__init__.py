"""What this machine has, and whether all of it works: one finding per check, and a one-line fix for each failure."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qvl_edge.doctor.checks import CHECKS
from qvl_edge.doctor.probe import Check, Failed, Skipped, one_line
from qvl_edge.errors import QvlError


@dataclass(frozen=True)
class Finding:
    """What a check found. `fix` is one line that repairs a failure; other findings have none."""

    name: str
    status: Literal["ok", "failed", "skipped"]
    found: str
    fix: str = ""


def examine(path: Path | None = None) -> Iterator[Finding]:
    """Every finding, as soon as it is known; with `path`, a bundle or a checkpoint, also about that."""
    for name, check in CHECKS.items():
        yield run(name, check, path)


def run(name: str, check: Check, path: Path | None = None) -> Finding:
    """The finding of one check; whatever it raises is one too."""
    try:
        return Finding(name, "ok", check(path))
    except Skipped as skipped:
        return Finding(name, "skipped", str(skipped))
    except Failed as failed:
        return Finding(name, "failed", failed.found, failed.fix)
    except QvlError as error:
        return Finding(name, "failed", *_split(one_line(error)))
    except Exception as error:
        # what is missing has a check of its own
        missing = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
        if sys.modules.get("torch") is None:
            missing = "torch"  # it may also break with an OSError
        if missing in ("torch", "onnxruntime", "kernels"):
            return Finding(name, "skipped", f"needs {missing}")
        if missing:
            return Finding(name, "failed", one_line(error), "pip install qvl-edge")
        return Finding(name, "failed", one_line(f"{type(error).__name__}: {error}"), "report this line")


def _split(message: str) -> tuple[str, str]:
    """What is wrong, and the next step, which our messages end with."""
    wrong, _, fix = message.rpartition("; ")
    if not wrong:
        wrong, _, fix = message.partition(". ")
    return (wrong, fix) if wrong and fix else (message, "see README.md")
