"""Continuous batching: answers that join and leave between decode steps.

Two threads. One prepares requests in their order: it opens pictures, makes tokens and encodes images, while the other
goes on decoding. That one owns the slots: between two decode steps of all running answers it prefills one chunk of one
prompt, so that a long prompt delays the others by a chunk and no more.
"""

import logging
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from qvl_edge.engine.inputs import Inputs
from qvl_edge.engine.run import Run
from qvl_edge.engine.sampling import Sampler, check_tokens
from qvl_edge.engine.slots import CHUNK, Sequence, Slots
from qvl_edge.errors import QvlError

log = logging.getLogger("qvl_edge")

SHARED_CHUNK = 128  # positions of a prompt between two steps of others: on one card about what a few steps cost
AHEAD = 2  # prepared requests that may wait for a slot: their images are in memory


class Cancelled(Exception):
    """The caller has gone."""


class TimeLimit(Exception):
    """A request took longer than it may."""


class Closed(Exception):
    """The scheduler is closed."""


class OutOfMemory(Exception):
    """There was not enough memory for the answers that were running; what they held is free again."""


@dataclass(eq=False)
class Job:
    """One request. `on_piece` gets its Run and more text, `on_end` the finished Run or what went wrong; both on a
    scheduler's thread."""

    prepare: Callable[[], Run]
    on_piece: Callable[[Run, str], None]
    on_end: Callable[[Run | Exception], None]
    deadline: float = float("inf")  # of time.monotonic()
    cancelled: threading.Event = field(default_factory=threading.Event)
    run: Run | None = None
    inputs: Inputs | None = None
    sampler: Sampler | None = None
    sequence: Sequence | None = None

    def check(self) -> None:
        """Raise if nobody wants this any more."""
        if self.cancelled.is_set():
            raise Cancelled
        if time.monotonic() > self.deadline:
            raise TimeLimit


class Scheduler:
    """Runs jobs over `slots`.

    encode: a Run's Inputs, its images encoded; sampler: how its tokens are chosen. Both are called on the preparing
    thread.
    """

    def __init__(self, slots: Slots, encode: Callable[[Run], Inputs], sampler: Callable[[Run], Sampler]):
        self._slots, self._encode, self._sampler = slots, encode, sampler
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._ready: deque[Job] = deque()
        self._active: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._count = 0  # jobs that were submitted and have no slot yet
        self._threads = [
            threading.Thread(target=work, name=f"qvl-edge-{name}", daemon=True)
            for name, work in (("prepare", self._prepare_all), ("decode", self._decode_all))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that have no slot yet."""
        return self._count

    @property
    def running(self) -> int:
        """Jobs in slots."""
        return len(self._active)

    def submit(self, job: Job) -> None:
        """Queue a job. Closed if the scheduler is."""
        with self._changed:
            if self._closed:
                raise Closed
            self._count += 1
        self._waiting.put(job)

    def close(self) -> None:
        """End all jobs with Closed and wait for the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _prepare_all(self) -> None:
        while (job := self._waiting.get()) is not None:
            try:
                if self._closed:
                    raise Closed
                job.check()
                job.run = job.prepare()
                job.sampler = self._sampler(job.run)
                job.inputs = self._encode(job.run)
            except Exception as error:
                self._drop(job, error)
                continue
            with self._changed:
                self._ready.append(job)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or len(self._ready) < AHEAD)
        while not self._waiting.empty():
            if (job := self._waiting.get()) is not None:
                self._drop(job, Closed())

    def _decode_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._ready or self._active)
                if self._closed:
                    break
            try:
                self._round()
            except Exception as error:
                self._fail(error)
        for job in [*self._active]:
            self._end(job, Closed())
        while self._ready:
            self._drop(self._ready.popleft(), Closed())

    def _round(self) -> None:
        """One chunk of one prompt, then one step of all that decode."""
        for job in [*self._active]:
            try:
                job.check()
            except Exception as error:
                self._end(job, error)
        filling = next((job for job in self._active if job.sequence and not job.sequence.running), None)
        if filling is None:
            filling = self._admit()
        if filling is not None:
            assert filling.sequence is not None
            alone = all(job is filling for job in self._active)
            token = self._slots.prefill(filling.sequence, CHUNK if alone else SHARED_CHUNK)
            if token is not None:
                self._push(filling, token)
        if any(job.sequence and job.sequence.running for job in self._active):
            found = self._slots.advance()
            for job in [*self._active]:
                for token in found.get(job.sequence, ()) if job.sequence else ():
                    if job in self._active:  # it may have ended with the one before
                        self._push(job, token)

    def _admit(self) -> Job | None:
        """Give a slot to the next job: once the prompt before it is through, so that it can share its beginning."""
        while self._slots.free:
            with self._changed:
                if not self._ready:
                    return None
                job = self._ready.popleft()
                self._changed.notify_all()
            try:
                job.check()
                assert job.run is not None and job.inputs is not None and job.sampler is not None
                job.sequence = self._slots.begin(job.inputs, job.sampler)
            except (QvlError, Cancelled, TimeLimit) as error:
                self._drop(job, error)
                continue
            job.run.cached_tokens = job.sequence.reused
            job.run.start()
            with self._changed:
                self._count -= 1
            self._active.append(job)
            return job
        return None

    def _push(self, job: Job, token: int) -> None:
        assert job.run is not None
        try:
            check_tokens([token])
        except QvlError as error:
            self._end(job, error)
            return
        assert job.sequence is not None
        piece = job.run.push(token, job.sequence.logprob)
        if piece:
            job.on_piece(job.run, piece)
        if job.run.finish_reason:
            self._end(job, job.run)

    def _end(self, job: Job, outcome: Run | Exception) -> None:
        """Take a job out of its slot, and say how it ended."""
        assert job.sequence is not None
        self._slots.end(job.sequence)
        self._active.remove(job)
        job.sequence = job.inputs = None
        job.on_end(outcome)

    def _drop(self, job: Job, error: Exception) -> None:
        """End a job that has no slot."""
        with self._changed:
            self._count -= 1
        job.inputs = None
        job.on_end(self._said(error))

    def _fail(self, error: Exception) -> None:
        """A step failed: whoever ran ends with it, and the next ones start from nothing."""
        said = self._said(error)
        for job in [*self._active]:
            self._end(job, said)
        self._slots.forget()
        if self._slots.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _said(self, error: Exception) -> Exception:
        """What a caller is told; a bug goes to the log, without its message, which may quote a prompt."""
        if isinstance(error, QvlError | Cancelled | TimeLimit | Closed):
            return error.with_traceback(None)  # which would keep tensors alive
        log.error("%s in a step\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
        return OutOfMemory() if out_of_memory(error) else RuntimeError("a step failed; the log says where")


def out_of_memory(error: Exception) -> bool:
    """Whether it says that memory ran out, on the host or a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch on a CPU, and onnxruntime, have no class of their own for it
    words = ("can't allocate memory", "not enough memory", "Failed to allocate memory", "CUDA out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
