"""Memory of the host and of the GPU in bytes: how much there is, is free, and is used, and giving it back."""

import contextlib
import ctypes
import mmap
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from qvl_edge.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Memory:
    """Bytes of one memory."""

    total: int
    free: int


def host_memory() -> Memory:
    """Of the host: what new programs could take without swapping, no more than this one's control group may have."""
    host = psutil.virtual_memory()
    limit, used = (_group_bytes(name) for name in ("memory.max", "memory.current"))
    if limit is not None and limit < host.total:
        return Memory(limit, min(host.available, limit - (used or 0)))
    return Memory(host.total, host.available)


def _group_bytes(name: str) -> int | None:
    """A figure of this process's control group (cgroup v2), as containers have one; None where there is none."""
    try:
        value = (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return None
    return int(value) if value.isdigit() else None


def device_memory(device: "torch.device") -> Memory:
    """Of a CUDA device, as its driver has it: other programs' share counts as taken."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return Memory(total, free)


def free_memory(device: "torch.device") -> int:
    """What a model on `device` may take in all, this process's own share of the host included."""
    return device_memory(device).free if device.type == "cuda" else host_memory().free + resident_bytes()


def resident_bytes() -> int:
    """What this process has in host memory now (VmRSS)."""
    return int(psutil.Process().memory_info().rss)


def peak_host_bytes() -> int:
    """The most that this process has ever had in host memory, on Linux since `reset_peak`."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return int(info.peak_wset)
    with contextlib.suppress(OSError):
        # VmHWM, since ru_maxrss of a process that was started by a larger one begins with that one's
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
    try:
        import resource
    except ImportError:
        return int(info.rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    """Let peak_host_bytes start again from what is in memory now, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def forget_pages(tensor: "torch.Tensor") -> None:
    """Release the whole pages inside of a mapped tensor, which nobody writes to; reading it maps them again.

    madvise(MADV_DONTNEED), on Linux; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def trim_heap() -> None:
    """Release memory that was freed and that glibc keeps for later: 1.1 GB after loading 5.9 GB of int4 layers, whose
    buffers of 25 MB each leave holes. Elsewhere nothing happens."""
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # not in musl
        libc.malloc_trim(0)


def return_buffers() -> None:
    """Have glibc return buffers from 1 MiB on, and free ends of threads' arenas, once freed. Elsewhere nothing happens.

    Its limits grow with what is freed, to 32 MiB of a buffer and twice as much of each arena's end, which malloc_trim
    leaves: after requests of 20 MB a server kept up to 110 MB, and a prompt of 293 tokens left 0.7 GB of holes in 32
    layers on a CPU. It takes no measurable time from such a prompt. A limit that is set stays.
    """
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for limit in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(limit, 1 << 20)


_UNITS = {"b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}
_MOST_GB = 4096  # a plain number up to here is in GB; nobody means 12 bytes
_LEAST_BYTES = 10**6  # and from here on in bytes


def parse_bytes(text: str | int) -> int:
    """Bytes of "12GB" or "12" (10^9 each), "12GiB" (2^30; what a card sold as 12 GB has), "800MB", or of an integer, as
    it is. ConfigError if it is none of them, or not positive."""
    if isinstance(text, int) and text > 0:
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit, number = (found[2].lower(), float(found[1])) if found else ("", 0.0)
    if not unit and (number <= _MOST_GB or number >= _LEAST_BYTES):
        unit = "gb" if number <= _MOST_GB else "b"
    if unit not in _UNITS or number <= 0:
        raise ConfigError(f"{text!r} is not a valid size; write it as 12GB (10^9 bytes) or 12GiB (2^30)")
    return int(number * _UNITS[unit])


def format_bytes(count: float) -> str:
    """ "1.23 GB" (10^9 bytes), and below a tenth of that "12.3 MB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
