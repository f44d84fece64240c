"""Whether llguidance compiles a grammar within limits, tried in a process of its own.

llguidance bounds the work of a step, but not that of its first regular expressions: {"multipleOf": 10000019} takes 45
MB a second until the system kills the process (llguidance 1.9). That work depends on the grammar alone, so a vocabulary
of bytes will do.
"""

import functools
import subprocess
import sys

from qvl_edge import child
from qvl_edge.errors import ConfigError

LIMIT_S = 5  # of the processor
WALL_S = 20  # on a machine that is busy
MAX_BYTES = 1 << 30  # of address space; an object of 100 properties takes 0.2 GB, Python included


def check_compiles(grammar: str, salt: str = "") -> None:
    """ConfigError if `grammar` takes more than LIMIT_S seconds or MAX_BYTES to compile, or is none.

    What was found is kept for the same salt: the time would tell another that a schema was seen before.
    """
    if error := _error_of(grammar, salt):
        raise ConfigError(f"response_format cannot be used: {error}")


@functools.lru_cache(maxsize=256)
def _error_of(grammar: str, salt: str) -> str:
    with child.start(__name__, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            error, _ = process.communicate(grammar, timeout=WALL_S)
        except subprocess.TimeoutExpired:
            process.kill()
            error = f"it takes more than {WALL_S} s to compile; make it simpler"
    if not error and process.returncode != 0:
        error = f"it takes more than {MAX_BYTES >> 20} MiB or {LIMIT_S} s to compile; make it simpler"
    return error


def main() -> None:
    """Compile what stdin holds, and say on stdout what is wrong with it."""
    import llguidance

    child.limit(MAX_BYTES, LIMIT_S)
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), sys.stdin.read(), log_level=0)
    if matcher.is_error():
        print(matcher.get_error().splitlines()[0][:300], end="")


if __name__ == "__main__":
    main()
