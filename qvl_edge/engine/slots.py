"""Slots: a batch of requests over one key-value cache, each at its own position, decoded together.

A free slot keeps the keys and values of its last request, and the next prompt with the same beginning prefills only the
rest. That is exact inside one NTK bucket: rotated keys depend on alpha, which the whole prompt's length decides. From
one decode step to the next everything stays on the device, so that a CUDA graph can be a step; on the CPU the same
function runs eagerly.
"""

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qvl_edge.engine.graph import StepGraphs, bucket_of, buckets_of, count_of, counts_of
from qvl_edge.engine.lookup import propose
from qvl_edge.engine.request import Element, Request, common_prefix
from qvl_edge.engine.sampling import NOT_FINITE, Kind, Samplers, check_logits
from qvl_edge.errors import PromptError
from qvl_edge.model.cache import KVCache
from qvl_edge.model.decoder import Decoder, place_sequence, prompt_alpha
from qvl_edge.model.fused import FusedDecoder

CHUNK = 512  # positions prefilled at once: what a layer leaves for them bounds the memory of a prefill
WARM_UP = (2, 32, 64, 128)  # prompt lengths: one for each block of rows that the kernels are compiled for
SCORED = 256  # positions whose logits are computed at once: 156 MB of Qwen-7B's


@dataclass
class _Slot:
    held: list[Element] = field(default_factory=list)
    alpha: float = 1.0
    salt: str = ""  # of the request that it holds: another's may not even learn how long it takes
    used: int = 0  # when it was last taken: the least recently used one goes first
    request: Request | None = None


class Slots:
    """A batch of slots over one cache of `capacity` positions each, allocated once.

    kv_cache: dtype of keys and values (None: the model's). graph: decode steps as CUDA graphs (None: for a FusedDecoder
    on CUDA). lookup: tokens that `advance` may guess at once for a lone greedy sequence.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        capacity: int,
        count: int = 1,
        kv_cache: torch.dtype | None = None,
        graph: bool | None = None,
        lookup: int = 0,
    ):
        device = model.device
        self.model, self.capacity, self.count = model, capacity, count
        self._kv_cache, self._lookup = kv_cache or model.dtype, lookup
        self.samplers = Samplers(count, model.config.vocab_size, device=device)
        self._slots = [_Slot() for _ in range(count)]
        self._clock = itertools.count(1)
        self._tokens = torch.zeros(count, dtype=torch.int64, device=device)
        pinned = device.type == "cuda"  # the copy of a step's tokens is the only thing the host ever waits for
        self._host_tokens = torch.zeros(count, dtype=torch.int64, pin_memory=pinned)
        self._embeds: Tensor | None = None  # of a step's tokens, where the table is not on the device
        if model.embeddings_device != device:
            shape = (count, 1, model.config.hidden_size)
            self._embeds = torch.zeros(shape, dtype=model.dtype, device=device)
            self._host_embeds = torch.zeros(shape, dtype=model.dtype, pin_memory=pinned)
        self._graph = isinstance(model, FusedDecoder) and device.type == "cuda" if graph is None else graph
        self._cache: KVCache | None = None
        self._graphs: StepGraphs | None = None
        self._allocate()

    @property
    def cache(self) -> KVCache:
        """Keys and values of all slots; allocated anew after `unload`."""
        return self._cache or self._allocate()

    def _allocate(self) -> KVCache:
        """The cache, and no graphs yet: they hold its addresses."""
        model, count = self.model, len(self._slots)
        cache = KVCache(
            model.config, count, self.capacity, dtype=self._kv_cache, device=model.device, block=model.cache_block
        )
        self._cache = cache
        for slot in range(count):
            place_sequence(model.config, cache, slot, 1)
            self._park(slot)
        if self._graph:
            self._graphs = StepGraphs(self._step_leading, self._changed(cache), model.device)
        return cache

    def _changed(self, cache: KVCache) -> tuple[Tensor, ...]:
        """All that a step changes, but for keys and values, which are written again before they are read."""
        return (self._tokens, cache.lengths, cache.filled, self.samplers.seen, self.samplers.counts)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile and load what answers run on a GPU, on parked slots; 16 kernels take 13 s on two cores."""
        if self._graphs is None:
            return
        cache, buckets = self.cache, buckets_of(self.capacity)
        changed = self._changed(cache)
        before = [tensor.clone() for tensor in changed]
        for tokens, bucket in itertools.product(WARM_UP, {buckets[0], buckets[-1]}):  # log-n has kernels of its own
            if tokens <= self.capacity:
                ids = torch.zeros(1, tokens, dtype=torch.int64, device=self.model.embeddings_device)
                self.model(self.model.embed(ids), cache.sequence(0).window(bucket))
                self._park(0)
        kinds = (Kind(*[False] * len(Kind._fields)), Kind(*[True] * len(Kind._fields)))
        for count, bucket, kind in itertools.product(counts_of(self.count), buckets, kinds):
            self._step(slice(0, count), bucket, kind)
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
        torch.cuda.synchronize(self.model.device)

    def unload(self) -> None:
        """Give the cache's memory back until the next sequence begins; nothing is held any more.

        For a vision tower that is in memory only while it encodes: the two are then never there together.
        """
        assert not self.requests, "a request is running"
        self.forget()
        self._cache = self._graphs = None
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def free(self) -> int:
        """Slots without a request."""
        return sum(slot.request is None for slot in self._slots)

    @property
    def requests(self) -> list[Request]:
        """Those that were begun and not ended, by slot."""
        return [slot.request for slot in self._slots if slot.request is not None]

    @torch.inference_mode()
    def begin(self, request: Request) -> None:
        """Give a request a free slot, with as much of its prompt's beginning as any slot holds, also one at work.

        PromptError if the prompt is too long.
        """
        length = request.alpha_length or len(request.ids)
        if request.positions > self.capacity:
            raise PromptError(
                f"the prompt has {len(request.ids)} tokens and the cache holds {self.capacity} positions, one of them "
                "for an answer; shorten the prompt or raise max_context"
            )
        alpha = prompt_alpha(self.model.config, length)
        free = [index for index, slot in enumerate(self._slots) if slot.request is None]
        if not free:
            raise RuntimeError(f"all {len(self._slots)} slots are taken; end a request first")
        reusable = request.reusable
        kind = (alpha, request.cache_salt)
        shared = [common_prefix(s.held, reusable) if (s.alpha, s.salt) == kind else 0 for s in self._slots]
        # one that would keep most of what it holds goes on with it; what else there is can be copied
        kept = [index for index in free if shared[index] and 2 * shared[index] >= len(self._slots[index].held)]
        index = max(kept, key=shared.__getitem__) if kept else min(free, key=lambda index: self._slots[index].used)
        source = max(range(len(shared)), key=shared.__getitem__)
        if shared[source] > shared[index]:
            self.cache.copy(source, index, shared[source])
            self._slots[index].held = self._slots[source].held[: shared[source]]
            shared[index] = shared[source]
        slot = self._slots[index]
        del slot.held[shared[index] :]
        slot.used, slot.request, (slot.alpha, slot.salt) = next(self._clock), request, kind
        request.slot, request.cached_tokens, request.held = index, shared[index], slot.held
        place_sequence(self.model.config, self.cache, index, length)

    @torch.inference_mode()
    def prefill(self, request: Request, most: int = CHUNK) -> int | None:
        """Up to `most` more positions of the prompt; at its end the first token (NOT_FINITE where logits are NaN or
        inf), else None."""
        logits = self._prefill(request, min(len(request.held) + most, len(request.ids)))
        if len(request.held) < len(request.ids):
            return None
        rows = slice(request.slot, request.slot + 1)
        self.samplers.set(request.slot, request.sampler)
        self.samplers.draw(rows)
        token = int(self.samplers.choose(logits, rows))
        request.logprob = self.samplers.accept(request.slot, token)
        self._start(request, token)
        return token

    @torch.inference_mode()
    def score(self, request: Request, most: int = CHUNK) -> list[float]:
        """Up to `most` more positions of a prompt with scored tokens: the log-probabilities that they gave.

        ConfigError where logits are NaN or inf.
        """
        done = len(request.held)
        start, end = next(span for span in request.scored if done < span[1] - 1)
        if done < start - 1:
            self._prefill(request, min(done + most, start - 1))
            return []
        targets = request.ids[done + 1 : min(done + 1 + min(most, SCORED), end)]
        logits = self._append(request, request.embed(self.model, done, done + len(targets)), all_logits=True)[0]
        request.held += request.elements[done : done + len(targets)]
        check_logits(logits, self.model.dtype)
        if request.on_logits is not None:
            request.on_logits(logits)
        return logits.log_softmax(-1)[torch.arange(len(targets)), targets].tolist()

    def _prefill(self, request: Request, end: int) -> Tensor:
        """Positions of the prompt up to `end`: logits (1, vocab) float32 of the last one."""
        done = len(request.held)
        logits = self._append(request, request.embed(self.model, done, end), all_logits=False)
        request.held += request.elements[done:end]
        return logits

    def _append(self, request: Request, embeds: Tensor, *, all_logits: bool) -> Tensor:
        """Run the model on the slot alone, which is parked before and after."""
        done = len(request.held)
        end = done + embeds.shape[1]
        cache = self.cache.sequence(request.slot).window(bucket_of(end, self.capacity))
        cache.lengths.fill_(done)
        cache.filled.fill_(done)
        try:
            return self.model(embeds, cache, all_logits=all_logits)
        finally:
            self._park(request.slot)

    def _start(self, request: Request, token: int) -> None:
        """Let a request decode from `token` on, after what its slot holds."""
        self._tokens[request.slot] = token
        self.cache.lengths[request.slot] = self.cache.filled[request.slot] = len(request.held)
        request.last = token

    def advance(self) -> dict[Request, list[int]]:
        """The next token of every running request, or several where a guess was right; otherwise as `step`."""
        running = [request for request in self.requests if request.decoding]
        if self._lookup and len(running) == 1 and running[0].sampler.is_greedy:
            (request,) = running
            assert request.last is not None
            room = self.capacity - len(request.held) - 1
            guess = propose([*request.held, request.last], min(self._lookup, room))
            if guess:
                return {request: self._verify(request, guess)}
        return {request: [token] for request, token in self.step().items()}

    @torch.inference_mode()
    def _verify(self, request: Request, guess: list[int]) -> list[int]:
        """Run the last token and a guess at once: the guess as far as it is what the model would say, and one more.

        What the cache holds past that is not looked at, and is written again by what comes.
        """
        assert request.last is not None
        given = [request.last, *guess]
        logits = self._append(
            request, self.model.embed(torch.tensor([given], device=self.model.device)), all_logits=True
        )
        said = torch.where(logits[0].sum(1).isfinite(), logits[0].argmax(1), NOT_FINITE).tolist()
        right = next((i for i, (one, other) in enumerate(zip(guess, said, strict=False)) if one != other), len(guess))
        request.held += given[: right + 1]
        self._start(request, said[right])
        return said[: right + 1]

    @torch.inference_mode()
    def step(self) -> dict[Request, int]:
        """The next token of every running request (NOT_FINITE where logits are NaN or inf).

        PromptError if one of them has no room left.
        """
        running = [request for request in self.requests if request.decoding]
        longest = max(len(request.held) for request in running)
        if longest >= self.capacity:
            raise PromptError(
                f"a request has {longest} positions, which fill the cache of {self.capacity}; raise max_context"
            )
        if self._graphs is not None:
            self._compact(running)
        if self._embeds is not None:
            ids = torch.tensor([[0]] * len(self._slots))
            for request in running:
                ids[request.slot] = max(request.last or 0, 0)
            self.model.embed(ids, out=self._host_embeds)
            self._embeds.copy_(self._host_embeds, non_blocking=True)
        bucket = bucket_of(longest + 1, self.capacity)
        if self._graphs is not None:
            leading = slice(0, count_of(max(request.slot for request in running) + 1, self.count))
            self.samplers.draw(leading)
            self._graphs.replay(leading.stop, bucket, self.samplers.kind(leading))
        else:
            for rows in _neighbours([request.slot for request in running]):
                self.samplers.draw(rows)
                self._step(rows, bucket, self.samplers.kind(rows))
        self._host_tokens.copy_(self._tokens)
        tokens = self._host_tokens.tolist()
        for request in running:
            assert request.last is not None
            request.held.append(request.last)
            request.last = tokens[request.slot]
            request.logprob = self.samplers.accept(request.slot, request.last)
        for index, slot in enumerate(self._slots):  # a replay counts on the device only, recording on the host too
            at_work = slot.request is not None and slot.request.decoding
            self.cache.filled[index] = len(slot.held) if at_work else 0
        return {request: tokens[request.slot] for request in running}

    @torch.inference_mode()
    def end(self, request: Request) -> None:
        """Free its slot, which keeps what it holds for a prompt with the same beginning."""
        if request.slot >= 0 and self._slots[request.slot].request is request:
            self._slots[request.slot].request = None
            request.last = None
            self.samplers.clear(request.slot)
            self._park(request.slot)

    def forget(self) -> None:
        """Let free slots hold nothing."""
        for slot in self._slots:
            if slot.request is None:
                slot.held = []

    def reset(self) -> None:
        """Empty all slots after a step has failed. Raises what the device raises if it cannot be used any more."""
        for index, slot in enumerate(self._slots):
            slot.request, slot.held = None, []
            self.samplers.clear(index)
            if self._cache is not None:  # else this would allocate it, which may be what has failed
                self._park(index)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # an error that stays shows here
            torch.cuda.empty_cache()

    def _park(self, slot: int) -> None:
        """Where attention writes nothing and reads nothing: past the end. A graph steps leading slots, whoever runs."""
        self.cache.lengths[slot] = self.capacity
        self.cache.filled[slot] = 0

    def _compact(self, running: list[Request]) -> None:
        """Bring requests that decode into the leading slots, so that the smallest graph that holds them steps them.

        A lone caller beside 15 free slots would pay for kernels of 16 rows and for attention in one part: by the model
        7 ms a token on an RTX 3060, where moving 2,048 positions takes 12 ms once.
        """
        leading = count_of(len(running), self.count)
        at_work = {request.slot for request in running}
        targets = (slot for slot in range(leading) if slot not in at_work)
        for slot, target in zip(sorted(slot for slot in at_work if slot >= leading), targets, strict=False):
            self._exchange(slot, target)

    def _exchange(self, first: int, second: int) -> None:
        """Each slot with all that it holds in the other's place: nothing that a later prompt could reuse is lost."""
        slots, pair, crossed = self._slots, [first, second], [second, first]
        slots[first], slots[second] = slots[second], slots[first]
        for index in pair:
            if (request := slots[index].request) is not None:
                request.slot = index
        self.cache.exchange(first, second, max(len(slots[index].held) for index in pair))
        self.samplers.exchange(first, second)
        self._tokens[pair] = self._tokens[crossed]

    def _step_leading(self, count: int, bucket: int, kind: Kind) -> None:
        self._step(slice(0, count), bucket, kind)

    def _step(self, rows: slice, bucket: int, kind: Kind) -> None:
        """All of a step that happens on the device, for neighbouring slots."""
        if self._embeds is not None:
            embeds = self._embeds[rows]
        else:
            embeds = self.model.embed(self._tokens[rows].clamp(min=0)[:, None])  # NOT_FINITE is no row of the table
        logits = self.model(embeds, self.cache.sequences(rows.start, rows.stop).window(bucket))
        self._tokens[rows] = self.samplers.choose(logits, rows, kind)


def _neighbours(slots: list[int]) -> list[slice]:
    """Sorted slots as slices of neighbours."""
    slices: list[slice] = []
    for slot in slots:
        if slices and slices[-1].stop == slot:
            slices[-1] = slice(slices[-1].start, slot + 1)
        else:
            slices.append(slice(slot, slot + 1))
    return slices
