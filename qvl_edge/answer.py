"""What an answer is: text, boxes, token ids, and what it cost."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from qvl_edge.errors import ConfigError, ImageError
from qvl_edge.text.boxes import Box, plain_text

if TYPE_CHECKING:
    from PIL import Image

    from qvl_edge.vision.image import Frame
    from qvl_edge.vision.source import ImageLike

SHOWN_SIDE = 900  # pixels of a notebook's picture

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
    option `logprobs` asked for them. sources: the pictures themselves, as they were given; a path is opened again by
    `draw`.
    """

    text: str
    boxes: list[Box]
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    logprobs: list[TokenLogprob] | None = None
    images: "Sequence[Frame]" = ()
    sources: "Sequence[ImageLike]" = field(default=(), repr=False, compare=False)

    @property
    def plain_text(self) -> str:
        """The text without <ref>, <box> and <quad>: what a reader is shown."""
        return plain_text(self.text).strip()

    def draw(self, image: int | None = None) -> "Image.Image":
        """A picture of the question, with the boxes that are on it; a PIL image.

        image: which picture, counted from 0; default the one that the boxes are on, or the last. ImageError if there is
        no such picture, or its file cannot be read any more.
        """
        from qvl_edge.text.draw import draw_boxes
        from qvl_edge.vision.image import load_image

        if image is None:
            image = self.boxes[-1].image if self.boxes else len(self.sources) - 1
        count = len(self.sources)
        if image not in range(count):
            raise ImageError(f"image is {image!r}, and the question has {count} pictures; the first one is 0")
        return draw_boxes(load_image(self.sources[image]), [box for box in self.boxes if box.image == image])

    def _repr_html_(self) -> str:
        """In a notebook: the text, and each picture that has boxes on it."""
        parts = [f"<p>{html.escape(self.plain_text)}</p>"]
        for index in sorted({box.image for box in self.boxes if box.image < len(self.sources)}):
            picture, buffer = self.draw(index), io.BytesIO()
            picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
            picture.save(buffer, "JPEG", quality=90)
            data = base64.b64encode(buffer.getvalue()).decode()
            parts.append(f'<img alt="picture {index + 1} with boxes" src="data:image/jpeg;base64,{data}">')
        return "\n".join(parts)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Answer":
        """From what `to_dict` made, without the pictures. ConfigError for anything else."""
        from qvl_edge.vision.image import Frame

        def made(kind: Any, given: Mapping[str, Any]) -> Any:
            known = {item.name for item in fields(kind)}
            return kind(**{name: _frozen(value) for name, value in given.items() if name in known})

        try:
            logprobs = values["logprobs"]
            return cls(
                text=values["text"],
                boxes=[made(Box, box) for box in values["boxes"]],
                token_ids=list(values["token_ids"]),
                finish_reason=values["finish_reason"],
                usage=made(Usage, values["usage"]),
                timing=made(Timing, values["timing"]),
                logprobs=None if logprobs is None else [made(TokenLogprob, item) for item in logprobs],
                images=[Frame(**image) for image in values["images"]],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"this is no answer as Answer.to_dict makes it: {type(error).__name__}: {error}"
            ) from None

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


def _frozen(value: Any) -> Any:
    """Lists as the tuples that they were."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
