"""Sessions of onnxruntime: what all of a process have in common, and the threads of torch beside them."""

import math
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import onnxruntime as ort

_pool_threads: list[int] = []  # of the pool that was made here
ERRORS_ONLY = 3  # log severity: the warnings about float16 on a CPU are of no use to a caller


def session_options() -> "ort.SessionOptions":
    """The options of a new session: errors only in its log, and the process's one pool of threads.

    A decoder has some 130 sessions, each of which would start threads of its own. Once there is a pool, onnxruntime
    opens no session without `use_per_session_threads = False`; an application's own sessions have to say so too.
    ImportError if onnxruntime is too old for a pool.
    """
    import onnxruntime as ort

    _make_pool()
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.use_per_session_threads = False
    return options


def set_threads(count: int | None) -> None:
    """Let torch and the pool compute with `count` threads. ValueError if the pool was made with another number.

    None: as many as torch has, which follow OMP_NUM_THREADS and the cores that the process may use, but no more than
    the processors that its control group is given, unless OMP_NUM_THREADS says so.
    """
    if count is None:
        quota = cpu_quota()
        if quota is None or _pool_threads or "OMP_NUM_THREADS" in os.environ or quota >= torch.get_num_threads():
            return
        count = quota
    if _pool_threads and count != _pool_threads[0]:
        raise ValueError(
            f"threads is {count}, but this process's onnxruntime computes with {_pool_threads[0]} since its first "
            "model; give the number with the first one, or start another process"
        )
    torch.set_num_threads(count)


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Processors that the control group may use at once, rounded up: a container's limit; None without one."""
    try:
        if (cgroup / "cpu.max").exists():  # version 2: "max 100000" is no limit
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return max(1, math.ceil(int(quota) / int(period))) if int(quota) > 0 else None
    except (OSError, ValueError):
        return None


@cache
def _make_pool() -> None:
    """A pool of as many threads as torch uses."""
    import onnxruntime as ort

    if not hasattr(ort, "set_global_thread_pool_sizes"):
        raise ImportError(
            f"onnxruntime {ort.__version__} has no pool of threads for all sessions, 1.23 has one; "
            "pip install --upgrade onnxruntime"
        )
    try:
        ort.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
        _pool_threads.append(torch.get_num_threads())
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        if "already been created" not in str(error):
            raise
        # the application made one, of the size that it wants
