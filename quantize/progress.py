"""What a running quantization tells whoever started it: one function that takes events."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """What quantizing one projection cost. Errors are relative squared ones.

    error: |(W - Q) X|² / |W X|² over the calibration inputs X as they arrive (of earlier layers already quantized);
    with --round-to-nearest, which has no inputs, |W - Q|² / |W|².
    """

    name: str  # transformer.h.0.attn.c_attn
    in_features: int
    out_features: int
    error: float
    round_to_nearest_error: float  # the same for what --round-to-nearest would write
    damp_percent: float | None = None  # above the setting where the Hessian needed more; None without a Hessian
    dead_channels: int = 0  # inputs that were 0 in every sample

    def to_dict(self) -> dict[str, Any]:
        """For quantize_report.json."""
        return asdict(self)


@dataclass(frozen=True)
class Event:
    """A step forward: the share that is done (0 … 1), what is going on, and the projection that was just finished."""

    fraction: float
    text: str
    layer: LayerReport | None = None
    lasting: bool = False  # the text is to stay, rather than to give way to the next event's


Progress = Callable[[Event], None]
Tick = Callable[[float, str], None]
"""Within one block: share of the block that is done, and what is going on."""


def ignore(event: Event) -> None:
    """The progress function of whoever does not watch."""
    del event
