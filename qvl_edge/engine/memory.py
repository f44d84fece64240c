"""Memory of the host and of the card: how much there is and how much is free, in bytes."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from qvl_edge.errors import ConfigError


@dataclass(frozen=True)
class Memory:
    """Bytes of one memory."""

    total: int
    free: int


def host_memory() -> Memory:
    """Of the host: what new programs could take without swapping, no more than this one's control group may have."""
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        raise ConfigError("/proc/meminfo cannot be read: free memory is known on Linux only; name a profile") from None
    found = {name.rstrip(":"): int(value) * 1024 for name, value, *_ in lines}
    total, free = found["MemTotal"], found["MemAvailable"]
    limit, used = (_group_bytes(name) for name in ("memory.max", "memory.current"))
    if limit is not None and limit < total:
        total, free = limit, min(free, limit - (used or 0))
    return Memory(total, free)


def _group_bytes(name: str) -> int | None:
    """A figure of this process's control group (cgroup v2), as containers have one; None where there is none."""
    try:
        value = (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return None
    return int(value) if value.isdigit() else None


def device_memory(device: torch.device) -> Memory:
    """Of a CUDA device, as its driver has it: other programs' share counts as taken."""
    free, total = torch.cuda.mem_get_info(device)
    return Memory(total, free)


def peak_host_bytes() -> int:
    """The most that this process has ever had in memory (VmHWM of /proc/self/status)."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Let peak_host_bytes start again from what is in memory now."""
    Path("/proc/self/clear_refs").write_text("5")


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str | int) -> int:
    """Bytes of "12GB" (10^9), "12GiB" (2^30; what a card sold as 12 GB has), "800MB" or a number. ConfigError if it is
    none of them, or not positive."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if found is None or found[2].lower() not in _UNITS or float(found[1]) <= 0:
        raise ConfigError(f"{text!r} is no amount of memory; write it as 12GB (10^9 bytes) or 12GiB (2^30)")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def resident_bytes() -> int:
    """What this process has in host memory now (VmRSS); 0 where that is not known."""
    try:
        return _status("VmRSS")
    except OSError:
        return 0


def _status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024


def free_memory(device: torch.device) -> int | None:
    """What a model on `device` may take in all, this process's own share of the host included; None if not known."""
    if device.type == "cuda":
        return device_memory(device).free
    try:
        return host_memory().free + resident_bytes()
    except ConfigError:
        return None
