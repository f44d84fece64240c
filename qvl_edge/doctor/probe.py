"""What several checks ask of the machine, and what a check raises."""

import importlib.metadata
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from qvl_edge.memory import Memory

Check: TypeAlias = Callable[[Path | None], str]
"""Takes the bundle or checkpoint that is examined, if there is one."""


class Failed(Exception):
    """What a check found, and one line that repairs it."""

    def __init__(self, found: str, fix: str):
        super().__init__(found)
        self.found, self.fix = found, fix


class Skipped(Exception):
    """Why a check does not apply here."""


def cuda() -> bool:
    """Whether torch sees a CUDA device; False without torch, which has a check of its own."""
    try:
        import torch
    except (ImportError, OSError):
        return False
    return torch.cuda.is_available()


def need_cuda(reason: str = "no CUDA device") -> None:
    """Skipped for this reason without a CUDA device."""
    if not cuda():
        raise Skipped(reason)


def version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def one_line(message: object) -> str:
    """Text with its line breaks as spaces."""
    return " ".join(str(message).split())


def enough(memory: "Memory", fix: str) -> str:
    """How much of a memory is free. Failed for too little."""
    from qvl_edge.engine.device import MIN_FREE
    from qvl_edge.memory import format_bytes

    found = f"{format_bytes(memory.free)} of {format_bytes(memory.total)} free"
    if memory.free < MIN_FREE:
        raise Failed(found, fix)
    return found
