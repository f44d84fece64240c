"""The machine that a result was measured on: hardware, versions, commit and date."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy
import torch

OPTIONAL = {"triton": "triton", "onnxruntime": "onnxruntime", "onnxruntime-gpu": "onnxruntime"}
"""Packages that may be installed, and the name of their version in a result."""


def cpu_name() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The commit of the working tree, with "+changes" if it is dirty; "unknown" outside of git."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Device, versions, commit and date; for a CUDA `device` also its size, driver and clocks."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    for package, name in OPTIONAL.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(package)
    machine: dict[str, Any] = {
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    place = torch.device(device)
    if place.type == "cuda":
        index = place.index or 0
        properties = torch.cuda.get_device_properties(index)
        machine |= {
            "device": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "host": cpu_name(),
        }
        versions["cuda"] = torch.version.cuda or "none"
        names = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
        rows = nvidia_smi("gpu", *names)
        machine["nvidia_smi"] = dict(zip(names, rows[min(index, len(rows) - 1)], strict=False)) if rows else {}
    return machine


def nvidia_smi(what: str, *names: str) -> list[list[str]]:
    """Rows of `nvidia-smi --query-WHAT=names`, none if it fails. Only values of the last name may have commas."""
    command = ["nvidia-smi", f"--query-{what}={','.join(names)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.split(",", len(names) - 1) for line in output.splitlines() if line.strip())
    return [[cell.strip() for cell in row] for row in rows]
