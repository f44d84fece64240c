"""Errors a caller can cause. Each says what, where, both numbers and the next step.

QvlError
├── ConfigError      (ValueError)  config.json or quantize_config.json contradicts itself or the weights
├── CheckpointError  (OSError)     a checkpoint's files are missing, truncated or foreign
├── BundleError      (OSError)     a bundle is incomplete, mixed or damaged
├── ImageError       (ValueError)  an image cannot be read or is refused
├── PromptError      (ValueError)  text or markup that cannot be turned into a prompt
├── FitError         (MemoryError) a model does not fit into the memory that is free
├── CalibrationError (ValueError)  calibration data that cannot be used
└── ParityError      (ValueError)  an exported graph does not compute what the model does
"""


class QvlError(Exception):
    """Base class of every error that this project raises on purpose."""


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


class FitError(QvlError, MemoryError):
    """A model does not fit into the memory that is free."""


class CalibrationError(QvlError, ValueError):
    """Calibration data that cannot be used."""


class ParityError(QvlError, ValueError):
    """An exported graph does not compute what the model does."""
