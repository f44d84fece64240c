"""What an answer is: text, boxes, token ids, and what it cost."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from qvl_edge.text.boxes import Box

if TYPE_CHECKING:
    from qvl_edge.vision.image import Frame

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenLogprob:
    """The natural-log probability of a token that was chosen, and (id, log-probability) of the likeliest in its place.

    They are the model's own, before temperature, penalty and whatever else chose.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts. `image_tokens` and `cached_tokens` are part of `prompt_tokens`.

    cached_tokens: how long a beginning of the prompt was still in the key-value cache from an earlier answer.
    cached_images: images that were not encoded again.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    image_tokens: int
    images: int
    cached_images: int


@dataclass(frozen=True)
class Timing:
    """Seconds spent on encoding images, on the prompt, and on decoding the tokens after the first."""

    image_s: float
    prefill_s: float
    decode_s: float
    prefilled_tokens: int  # of the prompt: those that were not cached
    decoded_tokens: int

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens a second, of those that were not cached."""
        return self.prefilled_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens a second, without the first one, which comes from the prompt's pass."""
        return self.decoded_tokens / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True)
class Answer:
    """An answer of the model; `finish_reason` is "stop" or "length".

    boxes: in pixels of the picture as it is shown. images: each picture's width and height as it is shown, which is the
    frame of its boxes, and whether its orientation tag turned the stored one. logprobs: of each of token_ids, where the
    option `logprobs` asked for them.
    """

    text: str
    boxes: list[Box]
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    logprobs: list[TokenLogprob] | None = None
    images: "Sequence[Frame]" = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "text": self.text,
            "boxes": [box.to_dict() for box in self.boxes],
            "images": [image._asdict() for image in self.images],
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "logprobs": None if self.logprobs is None else [asdict(item) for item in self.logprobs],
            "usage": asdict(self.usage),
            "timing": {
                **asdict(self.timing),
                "prefill_tokens_per_s": self.timing.prefill_tokens_per_s,
                "decode_tokens_per_s": self.timing.decode_tokens_per_s,
            },
        }
