"""Memory of the host and of the card: how much there is and how much is free, in bytes."""

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
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def reset_peak() -> None:
    """Let peak_host_bytes start again from what is in memory now."""
    Path("/proc/self/clear_refs").write_text("5")
