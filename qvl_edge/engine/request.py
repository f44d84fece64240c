"""Request: one question from its prompt to its answer."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from qvl_edge.answer import Answer, FinishReason, Timing, TokenLogprob, Usage
from qvl_edge.config import IMAGE_TOKENS
from qvl_edge.engine.sampling import Constraint, Sampler
from qvl_edge.errors import Cancelled, TimeLimit
from qvl_edge.options import GenerationOptions
from qvl_edge.published import SYSTEM
from qvl_edge.text.boxes import parse_boxes

if TYPE_CHECKING:  # a benchmark of the decode step needs neither tiktoken nor PIL
    from qvl_edge.model.decoder import Decoder
    from qvl_edge.text.prompt import History, Message, Prompt, Query
    from qvl_edge.text.tokenizer import TextStream
    from qvl_edge.vision.image import Frame
    from qvl_edge.vision.source import ImageLike

Element = int | str
"""A token id, or the content key of the image whose slot it is."""


@dataclass(frozen=True)
class Piece:
    """Text that will not change any more, never half a character, and the log-probabilities of its tokens."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(eq=False)
class Request:
    """What was asked, how far it is, and what has been answered.

    It is created with the first group of fields; `Runtime.prepare` turns them into tokens and features (`set_prompt`,
    `set_features`); the engine gives it a slot and pushes tokens until it is `done`, with a finish_reason or an error.
    Whoever waits for the answer calls `take` for new text, and `answer` at the end; both may be on another thread.
    """

    query: "Query" = ""
    history: "History" = ()
    system: str = SYSTEM
    chat_format: str | None = None  # "chatml" or "raw"; None: the model's
    generation: Mapping[str, Any] = field(default_factory=dict)  # overrides of the model's own GenerationOptions
    messages: "Sequence[Message]" = ()  # turns in any order, in the place of query, history and system
    continued: bool = True  # whether the assistant's message is continued where it is the last of `messages`
    markup_images: bool = False  # whether <img>path</img> in text opens that file
    prompt: "Prompt | None" = None  # in the place of query, history and system
    scored: Sequence[tuple[int, int]] = ()  # spans of the prompt whose tokens are scored; nothing is generated then
    alpha_length: int | None = None  # tokens whose count decides the NTK alpha; None: all of the prompt's
    on_logits: Callable[[Tensor], None] | None = None  # gets the logits (T, vocab) of scored tokens, part by part
    cache_salt: str = ""  # only requests of the same one share what is cached of prompts and images
    time_limit_s: float = float("inf")  # from its creation to its end
    notify: Callable[[], None] = lambda: None  # called, on the engine's thread, after a piece and at the end

    options: GenerationOptions = field(init=False)
    sampler: Sampler = field(init=False)
    ids: list[int] = field(init=False)
    elements: list[Element] = field(init=False)  # ids, with an image's key in each of its slots
    stop_ids: frozenset[int] = field(default=frozenset(), init=False)
    room: int = field(default=0, init=False)  # most tokens of the answer
    images: "list[Frame]" = field(default_factory=list, init=False)  # of the pictures in the prompt
    sources: "Sequence[ImageLike]" = field(default=(), init=False)  # the pictures, as they were given
    features: list[tuple[int, Tensor]] = field(default_factory=list, init=False)  # first slot, (slots, hidden)
    cached_images: int = field(default=0, init=False)
    image_s: float = field(default=0.0, init=False)

    slot: int = field(default=-1, init=False)  # -1: none yet
    held: list[Element] = field(default_factory=list, init=False)  # what the slot holds, in order
    cached_tokens: int = field(default=0, init=False)  # beginning of the prompt that the slot held already
    last: int | None = field(default=None, init=False)  # last token chosen, not in the cache yet; None before decoding
    logprob: TokenLogprob | None = field(default=None, init=False)  # of `last`, where it is wanted

    token_ids: list[int] = field(default_factory=list, init=False)
    logprobs: list[TokenLogprob] = field(default_factory=list, init=False)
    scores: list[float] = field(default_factory=list, init=False)  # natural-log probability of each scored token
    text: str = field(default="", init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._stream: TextStream | None = None
        self._cancelled = False
        self._pieces: deque[Piece] = deque()
        self._untold: list[TokenLogprob] = []  # of tokens that have become no text yet
        self._created = time.monotonic()
        self._began = self._first = self._last = 0.0

    @classmethod
    def of_ids(
        cls,
        ids: Sequence[int],
        options: GenerationOptions,
        *,
        constraint: Constraint | None = None,
        device: torch.device | str = "cpu",
        **asked: Any,
    ) -> Self:
        """A prepared request of token ids, whose answer is token ids and no text."""
        request = cls(**asked)
        request.set_prompt(ids, options, room=options.max_new_tokens, constraint=constraint, device=device)
        return request

    def set_prompt(
        self,
        ids: Sequence[int],
        options: GenerationOptions,
        *,
        room: int,
        stop_ids: frozenset[int] = frozenset(),
        stream: "TextStream | None" = None,
        constraint: Constraint | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """The tokens of the prompt, and how those of the answer are chosen and become text."""
        self.ids, self.elements, self.options = list(ids), list(ids), options
        self.stop_ids, self.room, self._stream = stop_ids, room, stream
        self.sampler = Sampler(options, self.ids, constraint=constraint, device=device)

    def set_features(self, starts: Sequence[int], keys: Sequence[str], features: Sequence[Tensor]) -> None:
        """The encoded images: first slot, content key and features (slots, hidden) of each."""
        for start, key, feature in zip(starts, keys, features, strict=True):
            self.elements[start : start + len(feature)] = [key] * len(feature)
            self.features.append((start, feature))

    def embed(self, model: "Decoder", first: int, end: int) -> Tensor:
        """Embeddings (1, end - first, hidden) of the prompt's positions first to end - 1."""
        embeds = model.embed(torch.tensor([self.ids[first:end]], device=model.device))
        for start, feature in self.features:
            low, high = max(first, start), min(end, start + len(feature))
            if low < high:
                embeds[0, low - first : high - first] = feature[low - start : high - start].to(embeds)
        return embeds

    @property
    def reusable(self) -> list[Element]:
        """The beginning of the prompt that may come from the cache: logits are wanted of what follows."""
        return self.elements[: self.scored[0][0] - 1] if self.scored else self.elements[:-1]

    @property
    def positions(self) -> int:
        """Cache positions that it needs at least: the prompt and one new token; of a scored prompt all but the last."""
        return len(self.ids) + (-1 if self.scored else 1)

    @property
    def characters(self) -> int:
        """Of the longest text in what was asked."""
        asked = [self.query, self.system, *(message.content for message in self.messages)]
        asked += [text for turn in _parts(self.history) for text in _parts(turn)]
        elements = (element for one in asked for element in _parts(one))
        texts = (element.get("text") if isinstance(element, Mapping) else element for element in elements)
        return max((len(text) for text in texts if isinstance(text, str)), default=0)

    @property
    def decoding(self) -> bool:
        """Whether it takes part in decode steps."""
        return self.last is not None

    @property
    def done(self) -> bool:
        """Whether there is an answer or an error."""
        return self.finish_reason is not None or self.error is not None

    def cancel(self) -> None:
        """The answer is not wanted any more; the engine ends the request before its next step."""
        self._cancelled = True

    def check(self) -> None:
        """Raise Cancelled or TimeLimit if the answer is not wanted any more."""
        if self._cancelled:
            raise Cancelled("the request was cancelled")
        if time.monotonic() - self._created > self.time_limit_s:
            raise TimeLimit(f"the request exceeded its time limit of {self.time_limit_s:g} s")

    def start(self) -> None:
        """Prefill begins."""
        self._began = self._first = self._last = time.perf_counter()

    def push(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Take the next token of the answer; its last one sets finish_reason."""
        if logprob is not None:
            self.logprobs.append(logprob)
            if token not in self.stop_ids:
                self._untold.append(logprob)
        self._last = time.perf_counter()
        if not self.token_ids:
            self._first = self._last
        self.token_ids.append(token)
        reason: FinishReason | None = "stop" if token in self.stop_ids else None
        text = ""
        if reason is None and self._stream is not None:
            text = self._stream.push(token)
            reason = "stop" if self._stream.stopped else None
        if reason is None and len(self.token_ids) >= self.room:
            reason = "length"
        if reason is not None and self._stream is not None:
            text += self._stream.close()
        if text or (reason is not None and self._untold):
            self.text += text
            self._pieces.append(Piece(text, tuple(self._untold)))
            self._untold.clear()
        self.finish_reason = reason

    def push_scores(self, logprobs: list[float]) -> None:
        """Take the log-probabilities of the next scored tokens."""
        self.scores += logprobs
        self._last = time.perf_counter()
        if len(self.scores) == sum(end - start for start, end in self.scored):
            self.finish_reason = "stop"

    def fail(self, error: Exception) -> None:
        """End without an answer."""
        self.error = error.with_traceback(None)  # which would keep tensors alive
        self.features = []

    def take(self) -> Piece | None:
        """What has come since the last call, joined; None if there is nothing."""
        pieces = []
        while self._pieces:
            pieces.append(self._pieces.popleft())
        if not pieces:
            return None
        return Piece(
            "".join(piece.text for piece in pieces), tuple(item for piece in pieces for item in piece.logprobs)
        )

    def answer(self) -> Answer:
        """The answer as far as it has come. Raises the error if there is one."""
        if self.error is not None:
            raise self.error
        usage = Usage(
            prompt_tokens=len(self.ids),
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
            prefilled_tokens=len(self.ids) - self.cached_tokens,
            decoded_tokens=max(len(self.token_ids) - 1, 0),
        )
        text = self.text.strip()  # upstream strips the response (qwen_generation_utils.py: _decode_chatml)
        boxes = parse_boxes(text, image_sizes=[image.size for image in self.images])
        logprobs = None if self.options.logprobs is None else self.logprobs
        reason = self.finish_reason or "length"
        return Answer(text, boxes, self.token_ids, reason, usage, timing, logprobs, self.images, self.sources)


def common_prefix(held: Sequence[Element], wanted: Sequence[Element]) -> int:
    """How many elements two prompts share from the first on."""
    for index, (one, other) in enumerate(zip(held, wanted, strict=False)):
        if one != other:
            return index
    return min(len(held), len(wanted))


def _parts(value: Any) -> Iterable[Any]:
    """Text as one part; none of what is no sequence, which the prompt refuses."""
    return [value] if isinstance(value, str) else value if isinstance(value, Iterable) else ()
