"""Engine: the one loop that answers requests, by continuous batching.

Requests join and leave between decode steps. A step prefills one chunk of one prompt and then decodes a token of every
running request, so that a long prompt delays the others by a chunk and no more. Every way in drives this loop: a
question in Python steps it until its answer is there, the server's Worker steps it on a thread of its own.
"""

import logging
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress

import torch

from qvl_edge.engine.request import Request
from qvl_edge.engine.sampling import check_tokens
from qvl_edge.engine.slots import CHUNK, Slots
from qvl_edge.errors import Cancelled, EngineError, EngineFailed, OutOfMemory, QvlError

log = logging.getLogger("qvl_edge")

SHARED_CHUNK = 128  # positions prefilled between two decode steps of others: on one card about what a few steps cost
MAX_FAILURES = 3  # failed steps in a row, out-of-memory aside, after which the engine no longer counts as healthy


class Engine:
    """Requests over the slots of one model.

    Any thread may call any method: steps take a lock, and a step advances every request, whichever thread asked for it.
    A step that fails ends all running requests with an error. `broken` is set when not even the slots can be cleared
    after that, as with a CUDA error that stays: every later request ends with it at once.
    """

    def __init__(self, slots: Slots):
        self.slots = slots
        self.lock = threading.RLock()
        self.broken: EngineFailed | None = None
        self._waiting: deque[Request] = deque()
        self._active: list[Request] = []
        self._failures = 0

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests in slots."""
        return len(self._active)

    @property
    def healthy(self) -> bool:
        """Whether requests can be answered."""
        return self.broken is None and self._failures < MAX_FAILURES

    def add(self, request: Request) -> None:
        """Queue a prepared request; it gets a slot in a later step, in the order of calls."""
        self._waiting.append(request)

    def abort(self, request: Request) -> None:
        """End a request now, wherever it is; one that is done stays as it is."""
        request.cancel()
        with self.lock:
            if request in self._active:
                self._end(request, Cancelled("the request was cancelled"))
            with suppress(ValueError):
                self._waiting.remove(request)
                self._drop(request, Cancelled("the request was cancelled"))

    def abort_all(self, error: EngineError) -> None:
        """End every request with `error`."""
        with self.lock:
            for request in [*self._active]:
                self._end(request, error)
            while self._waiting:
                self._drop(self._waiting.popleft(), error)

    def stream(self, request: Request) -> Iterator[str]:
        """Add a request and step until it is done, yielding its text as it comes. Raises its error.

        Closing the iterator aborts the request.
        """
        self.add(request)
        try:
            while True:
                if piece := request.take():
                    yield piece.text
                elif request.done:
                    break
                else:
                    self.step()
            if request.error is not None:
                raise request.error
        finally:
            self.abort(request)

    def complete(self, request: Request) -> Request:
        """Add a request, step until it is done, and return it. Raises its error."""
        for _ in self.stream(request):
            pass
        return request

    def run(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Each request as it gets done, with its answer or its error; the next one is taken when a slot is free.

        Closing the iterator aborts those that were taken.
        """
        source, taken = iter(requests), list[Request]()
        try:
            while True:
                while len(taken) < self.slots.count and (request := next(source, None)) is not None:
                    taken.append(request)
                    if not request.done:
                        self.add(request)
                if not taken:
                    return
                if not any(request.done for request in taken):
                    self.step()
                for request in [request for request in taken if request.done]:
                    taken.remove(request)
                    yield request
        finally:
            for request in taken:
                self.abort(request)

    def step(self) -> None:
        """Prefill one chunk of one prompt, then decode one token of every running request (more by prompt lookup).

        It never raises: what goes wrong is the error of the requests that it concerns.
        """
        with self.lock:
            if self.broken is not None:
                self.abort_all(self.broken)
                return
            try:
                self._step()
                self._failures = 0
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic in a native library is no Exception
                self._fail(error)

    def _step(self) -> None:
        for request in [*self._active]:
            try:
                request.check()
            except EngineError as error:
                self._end(request, error)
        prefilling = next((request for request in self._active if not request.decoding), None) or self._admit()
        if prefilling is not None:
            chunk = CHUNK if len(self._active) == 1 else SHARED_CHUNK
            if prefilling.scored:
                self._score(prefilling, chunk)
            elif (token := self.slots.prefill(prefilling, chunk)) is not None:
                self._push(prefilling, [token])
        if any(request.decoding for request in self._active):
            for request, tokens in self.slots.advance().items():
                self._push(request, tokens)

    def _admit(self) -> Request | None:
        """Give a slot to the next request: after the prefill of the one before, so that it can share its prompt."""
        while self.slots.free and self._waiting:
            request = self._waiting.popleft()
            self._active.append(request)  # from here on it ends with whatever goes wrong
            try:
                request.check()
                self.slots.begin(request)
            except (QvlError, EngineError) as error:
                self._end(request, error)
                continue
            request.start()
            return request
        return None

    def _push(self, request: Request, tokens: list[int]) -> None:
        try:
            if request.sampler.error is not None:
                raise request.sampler.error
            for token in tokens:
                check_tokens([token], self.slots.model.dtype)
                request.push(token, request.logprob)
                if request.done:
                    break
        except QvlError as error:
            self._end(request, error)
            return
        if request.done:
            self._end(request)
        else:
            request.notify()

    def _score(self, request: Request, chunk: int) -> None:
        try:
            request.push_scores(self.slots.score(request, chunk))
        except QvlError as error:
            self._end(request, error)
            return
        if request.done:
            self._end(request)

    def _end(self, request: Request, error: Exception | None = None) -> None:
        """Take a request out of its slot."""
        self._active.remove(request)
        try:
            self.slots.end(request)
        except Exception:
            if error is None:
                raise
            # on a broken device: `_fail` empties the slots, or finds that it cannot
        request.features = []
        self._drop(request, error)

    def _drop(self, request: Request, error: Exception | None) -> None:
        """Tell whoever waits for a request that it is done."""
        if error is not None and not request.done:
            request.fail(error)
        request.notify()

    def _fail(self, error: BaseException) -> None:
        """A step failed: all running requests end with an error, and the next ones start from empty slots."""
        told = engine_error(error)
        self._failures += not isinstance(told, OutOfMemory)
        for request in [*self._active]:
            self._end(request, told)
        try:
            self.slots.reset()
        except Exception as second:
            self.broken = EngineFailed(
                f"the device cannot be used any more ({type(second).__name__} after {type(error).__name__}); restart "
                "the process"
            )
            self.abort_all(self.broken)


def engine_error(error: BaseException) -> Exception:
    """What a caller is told of an error: one of ours as it is; any other goes to the log, and OutOfMemory or
    EngineFailed stands for it."""
    if isinstance(error, QvlError | EngineError):
        return error
    # without its message, which may quote a prompt
    log.error("%s in the engine\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    # torch on a CPU, and onnxruntime, have no class of their own for it
    words = ("can't allocate memory", "not enough memory", "Failed to allocate memory", "CUDA out of memory")
    no_memory = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    if no_memory or isinstance(error, MemoryError | torch.OutOfMemoryError):
        return OutOfMemory("this request does not fit into memory; send fewer images, less text or fewer max_tokens")
    return EngineFailed(f"the engine failed ({type(error).__name__}); its log says where")
