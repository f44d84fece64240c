"""Qwen-VL and Qwen-VL-Chat (first generation) on a small machine."""

import os
from typing import TYPE_CHECKING, Any

from qvl_edge.errors import (
    BundleError,
    CalibrationError,
    CheckpointError,
    ConfigError,
    FitError,
    ImageError,
    ParityError,
    PromptError,
    QvlError,
)

__version__ = "0.1.0"
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime writes a device id and events where it is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else torch's waiting threads keep cores from onnxruntime's

if TYPE_CHECKING:
    from qvl_edge.answer import Answer
    from qvl_edge.bundle import Bundle
    from qvl_edge.config import Config
    from qvl_edge.runtime import Runtime
    from qvl_edge.text.boxes import Box

# torch takes two seconds to import; `import qvl_edge` and `qvl-edge --help` do without until a name is used
_HOMES = {
    "Answer": "qvl_edge.answer",
    "Box": "qvl_edge.text.boxes",
    "Bundle": "qvl_edge.bundle",
    "Config": "qvl_edge.config",
    "Runtime": "qvl_edge.runtime",
}

__all__ = [
    "Answer",
    "Box",
    "Bundle",
    "BundleError",
    "CalibrationError",
    "CheckpointError",
    "Config",
    "ConfigError",
    "FitError",
    "ImageError",
    "ParityError",
    "PromptError",
    "QvlError",
    "Runtime",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qvl_edge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
