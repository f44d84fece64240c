"""What the API asks of whatever makes answers, and the engine that batches them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qvl_edge.answer import Answer
from qvl_edge.engine import scheduler
from qvl_edge.engine.run import Run
from qvl_edge.engine.scheduler import Job, Scheduler
from qvl_edge.errors import QvlError

if TYPE_CHECKING:
    from qvl_edge.runtime import Runtime


@dataclass(frozen=True)
class ChatRequest:
    """One checked request. Text is in {"text": …} elements and images are bytes: nothing in it opens anything."""

    query: list[dict[str, Any]]
    history: list[tuple[list[dict[str, Any]], str]]
    system: str | None  # None: the Runtime's
    generation: dict[str, Any]  # options of GenerationOptions
    n: int = 1  # draws; draw i has seed + i
    logprobs: int | None = None  # likeliest tokens wanted beside each token; None: no log-probabilities
    response_format: dict[str, Any] | None = None  # see qvl_edge.engine.constraint

    def draw(self, index: int) -> dict[str, Any]:
        """The generation options of draw `index`."""
        options = {**self.generation, "logprobs": self.logprobs, "response_format": self.response_format}
        seed = self.generation.get("seed")
        return options if seed is None else {**options, "seed": seed + index}


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its natural-log probability, and the likeliest ones in its place."""

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """The next piece of draw `index`'s text; never half a character."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """Draw `index` is complete; its Answer's text is the deltas joined, then stripped."""

    index: int
    answer: Answer


Event = Delta | Finished


class EngineError(Exception):
    """The engine cannot answer now, through no fault of the caller."""


class QueueFull(EngineError):
    """Too many requests wait; the caller may come back after `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: int = 1):
        super().__init__(f"{waiting} requests wait already; try again later")
        self.retry_after = retry_after


class OutOfMemory(EngineError):
    """This request needed more memory than there is; smaller ones can still be answered."""


class TimeLimit(EngineError):
    """The request took longer than the server allows."""


class Stopped(EngineError):
    """The server is shutting down."""


class Failed(EngineError):
    """A bug: the log says where."""


class Engine(Protocol):
    """What the API drives."""

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        ...

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        ...

    def submit(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        """Deltas of the draws in any order, and a Finished for each.

        The request is queued at the first step of the iterator, and closing it at any time cancels the request within
        a token. A step raises QvlError for a caller's mistake, and EngineError.
        """
        ...

    def close(self) -> None:
        """End what runs and wait for it; requests that are left get Stopped."""
        ...


class BatchEngine:
    """One Runtime whose slots are filled by a Scheduler: requests join and leave between decode steps."""

    def __init__(self, runtime: "Runtime", *, max_waiting: int = 32, time_limit_s: float = 300.0):
        self._runtime, self._time_limit_s, self._max_waiting = runtime, time_limit_s, max_waiting
        self._scheduler = Scheduler(runtime.slots, runtime.encode, runtime.sampler)

    @property
    def waiting(self) -> int:
        """Draws that have no slot yet."""
        return self._scheduler.waiting

    @property
    def running(self) -> int:
        """Draws in slots."""
        return self._scheduler.running

    async def submit(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        """See Engine.submit."""
        if self.waiting >= self._max_waiting:
            raise QueueFull(self.waiting)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | Exception] = asyncio.Queue()

        def emit(event: Event | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        draws = [_Draw(self._runtime, request, index, emit, self._time_limit_s) for index in range(request.n)]
        try:
            for draw in draws:
                self._scheduler.submit(draw.job)
            left = request.n
            while left:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                left -= isinstance(event, Finished)
                yield event
        except scheduler.Closed:
            raise Stopped("the server is shutting down") from None
        finally:
            for draw in draws:
                draw.job.cancelled.set()

    def close(self) -> None:
        """End what runs and wait for it; requests that are left get Stopped."""
        self._scheduler.close()


class _Draw:
    """One answer of a request: a Job whose pieces and end become events."""

    def __init__(self, runtime: "Runtime", request: ChatRequest, index: int, emit: Any, time_limit_s: float):
        given = {} if request.system is None else {"system": request.system}
        self._emit, self._index, self._decode = emit, index, runtime.tokenizer.decode_bytes
        self._time_limit_s, self._told = time_limit_s, 0
        self.job = Job(
            lambda: runtime.prepare(request.query, request.history, **given, **request.draw(index)),
            self._on_piece,
            self._on_end,
            deadline=time.monotonic() + time_limit_s,
        )

    def _on_piece(self, run: Run, text: str) -> None:
        self._emit(Delta(self._index, text, self._logprobs(run)))

    def _logprobs(self, run: Run) -> tuple[TokenLogprob, ...]:
        """Of the tokens since the last piece, without the model's own end."""
        new, self._told = run.logprobs[self._told :], len(run.logprobs)
        return tuple(
            TokenLogprob(
                self._decode([item.token_id]),
                item.logprob,
                tuple((self._decode([token]), value) for token, value in item.top),
            )
            for item in new
            if item.token_id not in run.stop_ids
        )

    def _on_end(self, outcome: Run | Exception) -> None:
        if isinstance(outcome, Run):
            if rest := self._logprobs(outcome):  # tokens that became no text: half a character, or a stop string
                self._emit(Delta(self._index, "", rest))
            self._emit(Finished(self._index, outcome.answer()))
        else:
            self._emit(self._said(outcome))

    def _said(self, error: Exception) -> Exception:
        if isinstance(error, QvlError):
            return error
        if isinstance(error, scheduler.TimeLimit):
            return TimeLimit(f"the request took longer than the {self._time_limit_s:g} s that this server allows")
        if isinstance(error, scheduler.OutOfMemory):
            return OutOfMemory(
                "this request does not fit into memory; send fewer images, less text or fewer max_tokens"
            )
        if isinstance(error, scheduler.Closed):
            return Stopped("the server is shutting down")
        if isinstance(error, scheduler.Cancelled):
            return Stopped("the caller has gone")
        return Failed("the engine failed; the log says where")
