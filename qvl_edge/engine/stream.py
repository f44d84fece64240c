"""Token ids -> text as it grows: no split characters, and nothing shown that a stop string takes back."""

import codecs
from collections.abc import Sequence

from qvl_edge.text.tokenizer import Tokenizer


class TextStream:
    """Collects tokens; `push` and `close` return what can be shown for good.

    After `stopped` is true the text ends before a stop string. Bytes that never become a character are shown as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = stop
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one token id, return the new text."""
        return self._release(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def close(self) -> str:
        """Return what was held back, at the end of the answer."""
        rest = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = rest + ("" if self.stopped else self._held), ""
        return rest

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that could begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-n:])), 0)
