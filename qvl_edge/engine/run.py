"""One answer while it is made: tokens in, pieces of text out, and at the end the Answer."""

import time
from dataclasses import dataclass, field

from PIL import Image

from qvl_edge.answer import Answer, FinishReason, Timing, TokenLogprob, Usage
from qvl_edge.config import IMAGE_TOKENS
from qvl_edge.engine.stream import TextStream
from qvl_edge.options import GenerationOptions
from qvl_edge.text.boxes import parse_boxes
from qvl_edge.text.prompt import Prompt
from qvl_edge.text.tokenizer import Tokenizer


@dataclass
class Run:
    """What was asked, and what has come so far. `room`: the most tokens that the answer may have."""

    prompt: Prompt
    images: list[Image.Image]
    options: GenerationOptions
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    room: int
    cached_tokens: int = 0
    cached_images: int = 0
    image_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self._stream = TextStream(self.tokenizer, self.options.stop)
        self._began = self._first = self._last = 0.0

    def start(self) -> None:
        """The prompt is about to be prefilled."""
        self._began = time.perf_counter()

    def push(self, token: int, logprob: TokenLogprob | None = None) -> str:
        """Take the next token; the text that can be shown for good. At the end `finish_reason` is set."""
        if logprob is not None:
            self.logprobs.append(logprob)
        self._last = time.perf_counter()
        if not self.token_ids:
            self._first = self._last
        self.token_ids.append(token)
        if token in self.stop_ids:
            return self._finish("stop", "")
        piece = self._stream.push(token)
        if self._stream.stopped:
            return self._finish("stop", piece)
        if len(self.token_ids) >= self.room:
            return self._finish("length", piece)
        self.text += piece
        return piece

    def _finish(self, reason: FinishReason, piece: str) -> str:
        self.finish_reason = reason
        piece += self._stream.close()
        self.text += piece
        return piece

    def answer(self) -> Answer:
        """The answer as far as it has come."""
        usage = Usage(
            prompt_tokens=len(self.prompt.ids),
            cached_tokens=self.cached_tokens,
            completion_tokens=len(self.token_ids),
            image_tokens=IMAGE_TOKENS * len(self.images),
            images=len(self.images),
            cached_images=self.cached_images,
        )
        timing = Timing(
            image_s=self.image_s,
            prefill_s=self._first - self._began,
            decode_s=self._last - self._first,
            prefilled_tokens=len(self.prompt.ids) - self.cached_tokens,
            decoded_tokens=max(len(self.token_ids) - 1, 0),
        )
        text = self.text.strip()  # upstream strips the response (qwen_generation_utils.py: _decode_chatml)
        boxes = parse_boxes(text, image_sizes=[image.size for image in self.images])
        logprobs = None if self.options.logprobs is None else self.logprobs
        return Answer(text, boxes, self.token_ids, self.finish_reason or "length", usage, timing, logprobs)
