"""The machine that a figure was measured on: written into every result."""

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from qvl_edge.errors import QvlError


def cpu_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The commit of the working tree, with "+changes" if it is not clean; "unknown" outside of git."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Device, versions, commit and date; of a GPU also what its kernels depend on, driver and clocks."""
    machine: dict[str, Any] = {
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        machine["versions"]["triton"] = importlib.metadata.version("triton")
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine |= {
            "device": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "host": cpu_name(),
        }
        machine["versions"]["cuda"] = torch.version.cuda
        asked = ["driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit"]
        machine["nvidia_smi"] = dict(zip(asked, next(iter(nvidia_smi("gpu", *asked)), []), strict=False))
    return machine


def nvidia_smi(what: str, *names: str) -> list[list[str]]:
    """Rows of `nvidia-smi --query-WHAT=names`; none if it is not installed or fails. Only the last name may have
    commas in its values."""
    command = ["nvidia-smi", f"--query-{what}={','.join(names)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.split(",", len(names) - 1) for line in output.splitlines() if line.strip())
    return [[cell.strip() for cell in row] for row in rows]


def use_device(parser: argparse.ArgumentParser, device: str, *, tiny: bool) -> None:
    """End with an error if `device` cannot run the GPU kernels; on the CPU they are interpreted, small shapes only."""
    if device == "cpu":
        if not tiny:
            parser.error("on the CPU the kernels run in Triton's interpreter, thousands of times slower: add --tiny")
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is loaded
    elif not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --tiny needs none")


@contextlib.contextmanager
def ends_with_its_message(program: str) -> Iterator[None]:
    """A QvlError inside ends `python -m program` with its message and exit code 1; also a decorator of a main."""
    try:
        yield
    except QvlError as error:
        raise SystemExit(f"{program}: {error}") from None
