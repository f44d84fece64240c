"""Errors a caller can cause. Each says what, where, both numbers and the next step."""

import re

# what moves a terminal's cursor, changes its colours or turns its text around: names come from files of others
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class QvlError(Exception):
    """Base class of every error that this project raises on purpose. Its text has no control characters."""

    def __str__(self) -> str:
        return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], super().__str__())


class ConfigError(QvlError, ValueError):
    """config.json or quantize_config.json contradicts itself or the weights."""


class CheckpointError(QvlError, OSError):
    """A checkpoint's files are missing, truncated or foreign."""


class BundleError(QvlError, OSError):
    """A bundle is incomplete, mixed or damaged."""


class ImageError(QvlError, ValueError):
    """An image cannot be read or is refused."""


class PromptError(QvlError, ValueError):
    """Text or markup that cannot be turned into a prompt."""


class ContextError(PromptError):
    """A prompt has more tokens than the context holds."""


class FitError(QvlError, MemoryError):
    """A model does not fit into the memory that is free."""


class CalibrationError(QvlError, ValueError):
    """Calibration data that cannot be used."""


class ParityError(QvlError, ValueError):
    """An exported graph does not compute what the model does."""


class EngineError(Exception):
    """The engine cannot answer a request, through no fault of the caller."""


class QueueFull(EngineError):
    """Too many requests are waiting; the caller may try again after `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: int = 1):
        super().__init__(f"{waiting} requests are waiting already; try again later")
        self.retry_after = retry_after


class Cancelled(EngineError):
    """The caller cancelled the request."""


class TimeLimit(EngineError):
    """A request exceeded its time limit."""


class OutOfMemory(EngineError):
    """The request needed more memory than there is; smaller ones can still be answered."""


class Stopped(EngineError):
    """The engine is shutting down."""


class EngineFailed(EngineError):
    """A step failed, on account of a bug or a broken device; the log says where."""
