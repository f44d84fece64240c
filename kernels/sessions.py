"""Sessions of onnxruntime: what all of a process have in common."""

from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import onnxruntime as ort

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


@cache
def _make_pool() -> None:
    """A pool of as many threads as torch uses, which follows OMP_NUM_THREADS and the cores that the process may use."""
    import onnxruntime as ort

    if not hasattr(ort, "set_global_thread_pool_sizes"):
        raise ImportError(
            f"onnxruntime {ort.__version__} has no pool of threads for all sessions, 1.23 has one; "
            "pip install --upgrade onnxruntime"
        )
    try:
        ort.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        if "already been created" not in str(error):
            raise
        # the application made one, of the size that it wants
