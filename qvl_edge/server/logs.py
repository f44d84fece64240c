"""Lines of the log, of which one cause may write only so many."""

import logging
import time

MOST, PERIOD_S = 20, 60.0  # lines of a cause in a period; 1,024 silent connections wrote 388 MB in 85 s
MOST_CAUSES = 256


class Sparing(logging.Filter):
    """Lets MOST lines of a cause through in PERIOD_S, and says with the next one how many it kept back.

    A cause is a logger and a template; of ours, which quote no request, the line as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}  # start of the period, lines in it

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging.Filter."""
        line = record.getMessage() if record.name == "qvl_edge.server" else str(record.msg)
        cause = (record.name, line[:100])
        now = time.monotonic()
        if len(self._seen) > MOST_CAUSES:
            self._seen.clear()
        began, count = self._seen.get(cause, (now, 0))
        if now - began > PERIOD_S:
            if count > MOST:
                record.msg, record.args = f"{record.getMessage()} ({count - MOST} more before)", ()
            began, count = now, 0
        self._seen[cause] = began, count + 1
        if count == MOST - 1:
            record.msg, record.args = f"{record.getMessage()} (more of these in {PERIOD_S:g} s are left out)", ()
        return count < MOST


def spare(logger: logging.Logger) -> None:
    """Let the handlers of `logger` write no more than that."""
    for handler in logger.handlers:
        handler.addFilter(Sparing())
