"""Worker: an Engine on threads of its own, for callers on an event loop or on other threads.

PREPARERS threads prepare requests (they tokenize, and encode images), as many prepare those with a schema, whose
compilation may take seconds, so that these delay nobody else; another steps the engine.
"""

import asyncio
import contextlib
import functools
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from qvl_edge.answer import Answer
from qvl_edge.engine.engine import Engine, engine_error
from qvl_edge.engine.request import Piece, Request
from qvl_edge.errors import QueueFull, Stopped

if TYPE_CHECKING:
    import torch

    from qvl_edge.text.tokenizer import Tokenizer

PREPARERS = 2
PREFETCH = 2  # prepared requests that may wait for a slot: their image features are in memory


class Model(Protocol):
    """What a Worker needs of a Runtime."""

    engine: Engine
    tokenizer: "Tokenizer"

    def prepare(self, request: Request) -> Request:
        """Turn what was asked into token ids and image features."""
        ...


class Worker:
    """Answers requests for others until `close`.

    At most max_waiting requests wait for a slot, or more if they were submitted together while none waited; each has
    time_limit_s seconds from its creation to its end.
    """

    def __init__(self, runtime: Model, *, max_waiting: int = 32, time_limit_s: float = 300.0):
        self.runtime, self._engine = runtime, runtime.engine
        self._max_waiting, self.time_limit_s = max_waiting, time_limit_s
        self._submitted, self._with_schema = queue.SimpleQueue[Request | None](), queue.SimpleQueue[Request | None]()
        self._unprepared = 0
        self._changed = threading.Condition()
        self._closed = False
        queues = (self._submitted, self._with_schema) * PREPARERS
        work: list[Callable[[], None]] = [self._decode, *(functools.partial(self._prepare, each) for each in queues)]
        self._threads = [threading.Thread(target=each, daemon=True) for each in work]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return self._unprepared + self._engine.waiting

    @property
    def running(self) -> int:
        """Requests in slots."""
        return self._engine.running

    @property
    def device(self) -> "torch.device":
        """Where the decoder runs."""
        return self._engine.slots.model.device

    @property
    def healthy(self) -> bool:
        """Whether requests can be answered: False after steps that failed for good, and after `close`."""
        return self._engine.healthy and all(thread.is_alive() for thread in self._threads)

    @property
    def failed(self) -> bool:
        """Whether it is over for good, without `close`: only a new process helps."""
        return self._engine.broken is not None or not (self._closed or all(t.is_alive() for t in self._threads))

    def submit(self, requests: Sequence[Request], notify: Callable[[int], None] = lambda index: None) -> None:
        """Queue requests; `notify` is called, on a thread of the worker, for each piece of an answer and at its end.

        QueueFull, Stopped or EngineFailed if they cannot be taken. What is wrong with one of them becomes its `error`,
        an EngineError or a QvlError.
        """
        if self._engine.broken is not None:
            raise self._engine.broken
        with self._changed:
            if self._closed:
                raise _stopped()
            # where nothing waits, all are taken: a request for more answers than max_waiting has its turn too
            if self.waiting and self.waiting + len(requests) > self._max_waiting:
                raise QueueFull(self.waiting)
            self._unprepared += len(requests)
            for index, request in enumerate(requests):
                request.notify = functools.partial(notify, index)
                request.time_limit_s = min(request.time_limit_s, self.time_limit_s)
                constrained = request.generation.get("response_format") is not None
                (self._with_schema if constrained else self._submitted).put(request)

    async def stream(
        self, requests: Sequence[Request], *, whole: bool = False
    ) -> AsyncGenerator[tuple[int, Piece | Answer], None]:
        """(index, Piece) for the answers of `requests` as they come, in any order, and (index, Answer) at each's end.

        With `whole`, an answer comes as its first Piece and one with all the rest, which spares the event loop a
        wake-up a token.
        Nothing is queued before the first step. Closing the iterator cancels the requests within a decode step. A step
        raises QvlError for a mistake of the caller, and EngineError.
        """
        loop, moved = asyncio.get_running_loop(), asyncio.Queue[int]()
        begun = set[int]()

        def notify(index: int) -> None:
            if whole and index in begun and not requests[index].done:
                return
            begun.add(index)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(moved.put_nowait, index)

        try:
            self.submit(requests, notify)
            left = set(range(len(requests)))
            while left:
                index = await moved.get()
                request = requests[index]
                done = request.done  # before the last piece is taken
                if piece := request.take():
                    yield index, piece
                if done and index in left:
                    left.remove(index)
                    yield index, request.answer()
        finally:
            for request in requests:
                request.cancel()
                request.notify = _nobody_listens  # the old one leads back to the requests: a cycle keeps their pictures

    def close(self) -> None:
        """End every request with Stopped and wait for the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for _ in range(PREPARERS):
            self._submitted.put(None)
            self._with_schema.put(None)
        for thread in self._threads:
            thread.join()

    def _prepare(self, submitted: "queue.SimpleQueue[Request | None]") -> None:
        while (request := submitted.get()) is not None:
            error = self._error_in_preparing(request)
            with self._changed:
                self._unprepared -= 1
                if error is None and self._closed:
                    error = _stopped()
                if error is None:
                    self._engine.add(request)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closed or self._engine.waiting < PREFETCH)
            if error is not None:
                request.fail(error)
                request.notify()
            request = error = None  # else they stay until the next one comes

    def _error_in_preparing(self, request: Request) -> Exception | None:
        try:
            if self._closed:
                return _stopped()
            request.check()
            self.runtime.prepare(request)
        except BaseException as error:  # a panic in a native library is no Exception
            return engine_error(error)
        return None

    def _decode(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._engine.waiting or self._engine.running)
                if self._closed:
                    break
            self._engine.step()
            with self._changed:
                self._changed.notify_all()
        self._engine.abort_all(_stopped())


def _nobody_listens() -> None:
    pass


def _stopped() -> Stopped:
    return Stopped("the server is shutting down")
