"""Slots: sequences side by side over one cache, each at its own position, decoded together.

A slot that is free keeps the keys and values of its last sequence, and the next prompt that begins alike prefills only
the rest. That is exact inside one NTK bucket: rotated keys depend on alpha, which the whole prompt's length decides.
From one decode step to the next everything stays on the device, so that a CUDA graph can be a step; on the CPU the same
function runs eagerly.
"""

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qvl_edge.answer import TokenLogprob
from qvl_edge.engine.decoder import Decoder
from qvl_edge.engine.graph import StepGraphs, bucket_of
from qvl_edge.engine.inputs import Element, Inputs, common_prefix
from qvl_edge.engine.lookup import propose
from qvl_edge.engine.sampling import NOT_FINITE, Kind, Sampler, Samplers
from qvl_edge.errors import PromptError
from qvl_edge.model.cache import KVCache
from qvl_edge.model.decoder import place_sequence, prompt_alpha
from qvl_edge.model.fused import FusedDecoder

CHUNK = 512  # positions that are prefilled at once: what a layer leaves for them bounds the memory of a prefill


@dataclass(eq=False)
class Sequence:
    """One prompt and what follows, in its slot from `Slots.begin` to `Slots.end`."""

    slot: int
    inputs: Inputs
    sampler: Sampler
    reused: int  # positions that the slot held already
    held: list[Element]  # what the slot holds, in order
    last: int | None = None  # the last token chosen, not yet in the cache; None while the prompt is not through
    logprob: TokenLogprob | None = None  # of `last`, where it is wanted

    @property
    def running(self) -> bool:
        """Whether it takes part in decode steps."""
        return self.last is not None


@dataclass
class _Slot:
    held: list[Element] = field(default_factory=list)
    alpha: float = 1.0
    used: int = 0  # when it was last taken; the one that was longest ago goes first
    sequence: Sequence | None = None


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
        self.model, self.capacity, self._kv_cache, self._lookup = model, capacity, kv_cache or model.dtype, lookup
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
        cache = KVCache(model.config, count, self.capacity, dtype=self._kv_cache, device=model.device)
        self._cache = cache
        for slot in range(count):
            place_sequence(model.config, cache, slot, 1)
            self._park(slot)
        if self._graph:
            self._graphs = StepGraphs(self._step_all, (self._tokens, cache.lengths, self.samplers.seen), model.device)
        return cache

    def unload(self) -> None:
        """Give the cache's memory back until the next sequence begins; nothing is held any more.

        For a vision tower that is in memory only while it encodes: the two are then never there together.
        """
        assert not self.sequences, "a sequence is running"
        self.forget()
        self._cache = self._graphs = None
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def free(self) -> int:
        """Slots that no sequence has."""
        return sum(slot.sequence is None for slot in self._slots)

    @property
    def sequences(self) -> list[Sequence]:
        """Those that were begun and not ended, by slot."""
        return [slot.sequence for slot in self._slots if slot.sequence is not None]

    @torch.inference_mode()
    def begin(self, inputs: Inputs, sampler: Sampler) -> Sequence:
        """Take a free slot, with as much of this prompt's beginning as any slot holds, also one that is at work.

        At least the last position is left to prefill: its logits are wanted. PromptError if the prompt is too long.
        """
        if len(inputs) >= self.capacity:
            raise PromptError(
                f"the prompt has {len(inputs)} tokens and the cache holds {self.capacity} positions, one of them for "
                "an answer; shorten the prompt or raise max_context"
            )
        alpha = prompt_alpha(self.model.config, len(inputs))
        free = [index for index, slot in enumerate(self._slots) if slot.sequence is None]
        if not free:
            raise RuntimeError(f"all {len(self._slots)} slots are taken; end a sequence first")
        shared = [common_prefix(slot.held, inputs.elements[:-1]) if slot.alpha == alpha else 0 for slot in self._slots]
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
        slot.alpha, slot.used = alpha, next(self._clock)
        slot.sequence = Sequence(index, inputs, sampler, shared[index], slot.held)
        place_sequence(self.model.config, self.cache, index, len(inputs))
        return slot.sequence

    def prefill(self, sequence: Sequence, most: int = CHUNK) -> int | None:
        """Up to `most` more positions of the prompt; once it is through, the first token (NOT_FINITE where there are no
        numbers), else None."""
        logits = self.prefill_logits(sequence, most)
        if logits is None:
            return None
        rows = slice(sequence.slot, sequence.slot + 1)
        self.samplers.set(sequence.slot, sequence.sampler)
        self.samplers.draw(rows)
        token = int(self.samplers.choose(logits, rows))
        sequence.logprob = self.samplers.accept(sequence.slot, token)
        self.start(sequence, token)
        return token

    @torch.inference_mode()
    def prefill_logits(self, sequence: Sequence, most: int = CHUNK) -> Tensor | None:
        """As prefill, but the logits (1, vocab) float32 of the prompt's last position instead of a token."""
        done = len(sequence.held)
        end = min(done + most, len(sequence.inputs))
        logits = self._append(sequence, sequence.inputs.embed(self.model, done, end), all_logits=False)
        sequence.held += sequence.inputs.elements[done:end]
        return logits if end == len(sequence.inputs) else None

    @torch.inference_mode()
    def extend(self, sequence: Sequence, ids: list[int]) -> Tensor:
        """Append given tokens after the prompt or the last ones given: logits (T, vocab) float32 after each."""
        embeds = self.model.embed(torch.tensor([ids], device=self.model.device))
        logits = self._append(sequence, embeds, all_logits=True)
        sequence.held += ids
        return logits[0]

    def _append(self, sequence: Sequence, embeds: Tensor, *, all_logits: bool) -> Tensor:
        """Run the model on the slot alone, which is parked before and after."""
        done = len(sequence.held)
        end = done + embeds.shape[1]
        cache = self.cache.sequence(sequence.slot).window(bucket_of(end, self.capacity))
        cache.lengths.fill_(done)
        cache.filled.fill_(done)
        try:
            return self.model(embeds, cache, all_logits=all_logits)
        finally:
            self._park(sequence.slot)

    @torch.inference_mode()
    def start(self, sequence: Sequence, token: int) -> None:
        """Let a sequence decode from `token` on, after what its slot holds."""
        self._tokens[sequence.slot] = token
        self.cache.lengths[sequence.slot] = self.cache.filled[sequence.slot] = len(sequence.held)
        sequence.last = token

    def advance(self) -> dict[Sequence, list[int]]:
        """The next token of every running sequence, or several where a guess was right; otherwise as `step`."""
        running = [sequence for sequence in self.sequences if sequence.running]
        if self._lookup and len(running) == 1 and running[0].sampler.plainly_greedy:
            (sequence,) = running
            assert sequence.last is not None
            room = self.capacity - len(sequence.held) - 1
            guess = propose([*sequence.held, sequence.last], min(self._lookup, room))
            if guess:
                return {sequence: self._verify(sequence, guess)}
        return {sequence: [token] for sequence, token in self.step().items()}

    @torch.inference_mode()
    def _verify(self, sequence: Sequence, guess: list[int]) -> list[int]:
        """Run the last token and a guess at once: the guess as far as it is what the model would say, and one more.

        What the cache holds past that is not looked at, and is written again by what comes.
        """
        assert sequence.last is not None
        given = [sequence.last, *guess]
        logits = self._append(
            sequence, self.model.embed(torch.tensor([given], device=self.model.device)), all_logits=True
        )
        said = torch.where(logits[0].sum(1).isfinite(), logits[0].argmax(1), NOT_FINITE).tolist()
        right = next((i for i, (one, other) in enumerate(zip(guess, said, strict=False)) if one != other), len(guess))
        sequence.held += given[: right + 1]
        self.start(sequence, said[right])
        return said[: right + 1]

    @torch.inference_mode()
    def step(self) -> dict[Sequence, int]:
        """The next token of every running sequence (NOT_FINITE where logits are no numbers).

        PromptError if one of them has no room left.
        """
        running = [sequence for sequence in self.sequences if sequence.running]
        longest = max(len(sequence.held) for sequence in running)
        if longest >= self.capacity:
            raise PromptError(
                f"a sequence has {longest} positions, which fill the cache of {self.capacity}; raise max_context"
            )
        if self._embeds is not None:
            ids = torch.tensor([[0]] * len(self._slots))
            for sequence in running:
                ids[sequence.slot] = max(sequence.last or 0, 0)
            self._host_embeds.copy_(self.model.embed(ids))
            self._embeds.copy_(self._host_embeds, non_blocking=True)
        bucket = bucket_of(longest + 1, self.capacity)
        if self._graphs is not None:
            self.samplers.draw()
            self._graphs.replay(bucket, self.samplers.kind())
        else:
            for rows in _neighbours([sequence.slot for sequence in running]):
                self.samplers.draw(rows)
                self._step(rows, bucket, self.samplers.kind(rows))
        self._host_tokens.copy_(self._tokens)
        tokens = self._host_tokens.tolist()
        for sequence in running:
            assert sequence.last is not None
            sequence.held.append(sequence.last)
            sequence.last = tokens[sequence.slot]
            sequence.logprob = self.samplers.accept(sequence.slot, sequence.last)
        for index, slot in enumerate(self._slots):  # a replay counts on the device only, recording on the host too
            at_work = slot.sequence is not None and slot.sequence.running
            self.cache.filled[index] = len(slot.held) if at_work else 0
        return {sequence: tokens[sequence.slot] for sequence in running}

    @torch.inference_mode()
    def end(self, sequence: Sequence) -> None:
        """Free its slot, which keeps what it holds for a prompt that begins alike."""
        if self._slots[sequence.slot].sequence is sequence:
            self._slots[sequence.slot].sequence = None
            sequence.last = None
            self.samplers.clear(sequence.slot)
            self._park(sequence.slot)

    def forget(self) -> None:
        """Let free slots hold nothing."""
        for slot in self._slots:
            if slot.sequence is None:
                slot.held = []

    def _park(self, slot: int) -> None:
        """Where attention writes nothing and reads nothing: past the end. A graph steps all slots, whoever runs."""
        self.cache.lengths[slot] = self.capacity
        self.cache.filled[slot] = 0

    def _step_all(self, bucket: int, kind: Kind) -> None:
        self._step(slice(0, len(self._slots)), bucket, kind)

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
