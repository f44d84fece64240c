"""The next token from logits, as transformers' logits processors do it and in their order.

Everything stays on the logits' device and never synchronizes, so that a CUDA graph can capture it: the random numbers
are drawn beforehand, each sequence's from its own generator. A sequence gets the same tokens alone and in a batch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qvl_edge.answer import TokenLogprob
from qvl_edge.errors import ConfigError, QvlError
from qvl_edge.options import MAX_LOGPROBS, MIN_TEMPERATURE, GenerationOptions

NOT_FINITE = -1  # in the place of a token where logits are NaN or inf


class Constraint(Protocol):
    """What may come next, for one sequence."""

    def allowed(self) -> Tensor:
        """(vocab,) bool on the CPU, at least one of them true."""
        ...

    def accept(self, token: int) -> None:
        """Go on after `token`, which was allowed."""
        ...


class Sampler:
    """How one sequence's tokens are chosen: its options, its random state, and the tokens of its prompt."""

    def __init__(
        self,
        options: GenerationOptions,
        prompt_ids: Sequence[int],
        *,
        constraint: Constraint | None = None,
        device: torch.device | str = "cpu",
    ):
        self.options, self.prompt_ids, self.constraint = options, list(prompt_ids), constraint
        self.error: QvlError | None = None  # of the constraint: it ends this sequence, and no other of its batch
        self.generator = torch.Generator(device=device)
        if options.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(options.seed)

    @property
    def is_greedy(self) -> bool:
        """Whether each token is just the argmax of the logits."""
        options = self.options
        chosen = not options.do_sample and not self.is_penalized and not options.logit_bias
        return chosen and options.logprobs is None and self.constraint is None

    @property
    def is_penalized(self) -> bool:
        """Whether earlier tokens change the logits."""
        options = self.options
        return options.repetition_penalty != 1.0 or options.presence_penalty != 0 or options.frequency_penalty != 0


class Kind(NamedTuple):
    """What any sequence of a step needs: each combination has a CUDA graph of its own."""

    sampled: bool  # do_sample
    cut: bool  # top_k, top_p or min_p
    penalized: bool  # repetition, presence or frequency penalty
    scored: bool  # logprobs
    biased: bool  # logit_bias or a constraint


class Samplers:
    """Sampling for a batch of slots: one tensor per option, whose row is rewritten when another request takes the slot.

    seen (B, vocab) bool: tokens of prompt and answer, where a penalty is set. counts (B, vocab) int32: how often the
    answer has each. noise (B, vocab) float32: exponential variates. bias (B, vocab) float32: logit_bias, and -inf where
    a constraint forbids a token. scores (B, 1 + n) float32 and likeliest (B, n) int64: the log-probability
    of the last choice and those of the n likeliest tokens.
    """

    def __init__(self, slots: int, vocab: int, *, device: torch.device | str = "cpu"):
        self.samplers: list[Sampler | None] = [None] * slots
        self.vocab = vocab
        self._sample = torch.zeros(slots, 1, dtype=torch.bool, device=device)
        self._repetition, self._temperature, self._top_p = torch.ones(3, slots, 1, device=device)
        self._presence, self._frequency = torch.zeros(2, slots, 1, device=device)
        self._min_p = torch.full((slots, 1), -torch.inf, device=device)  # its logarithm
        self._top_k = torch.full((slots, 1), vocab, dtype=torch.int64, device=device)
        self.seen = torch.zeros(slots, vocab, dtype=torch.bool, device=device)
        self.counts = torch.zeros(slots, vocab, dtype=torch.int32, device=device)
        self.noise = torch.ones(slots, vocab, device=device)
        self.bias = torch.zeros(slots, vocab, device=device)
        likeliest = min(MAX_LOGPROBS, vocab)
        self.scores = torch.zeros(slots, 1 + likeliest, device=device)
        self.likeliest = torch.zeros(slots, likeliest, dtype=torch.int64, device=device)

    def set(self, slot: int, sampler: Sampler) -> None:
        """Let `slot` sample by `sampler` from now on."""
        self.samplers[slot], options = sampler, sampler.options
        self._sample[slot] = options.do_sample
        self._repetition[slot] = options.repetition_penalty
        self._presence[slot], self._frequency[slot] = options.presence_penalty, options.frequency_penalty
        self._min_p[slot] = math.log(options.min_p) if options.min_p else -torch.inf
        self._temperature[slot] = max(options.temperature, MIN_TEMPERATURE)
        # the probabilities may add up to more than 1 by rounding
        self._top_p[slot] = options.top_p if options.top_p < 1.0 else 2.0
        self._top_k[slot] = min(options.top_k or self.vocab, self.vocab)
        self.bias[slot] = self._bias(sampler)
        if sampler.is_penalized:
            self.seen[slot], self.counts[slot] = False, 0
            self.seen[slot, torch.tensor(sampler.prompt_ids, dtype=torch.int64, device=self.seen.device)] = True

    def _bias(self, sampler: Sampler) -> Tensor:
        """(vocab,) float32 on the CPU: logit_bias."""
        bias = torch.zeros(self.vocab)
        if given := sampler.options.logit_bias:
            bias[list(given)] = torch.tensor(list(given.values()))
        return bias

    def clear(self, slot: int) -> None:
        """Let `slot` have no sampler; its token is ignored."""
        self.samplers[slot] = None

    def exchange(self, first: int, second: int) -> None:
        """Two slots in one another's place."""
        pair, crossed = [first, second], [second, first]
        self.samplers[first], self.samplers[second] = self.samplers[second], self.samplers[first]
        for tensor in vars(self).values():
            if isinstance(tensor, Tensor):
                tensor[pair] = tensor[crossed]

    def kind(self, rows: slice = slice(None)) -> Kind:
        """What the slots `rows` need."""
        found = [sampler for sampler in self.samplers[rows] if sampler is not None]
        options = [sampler.options for sampler in found]
        return Kind(
            any(o.do_sample for o in options),
            any(o.do_sample and (o.top_k > 0 or o.top_p < 1.0 or o.min_p > 0) for o in options),
            any(sampler.is_penalized for sampler in found),
            any(o.logprobs is not None for o in options),
            any(sampler.constraint is not None or sampler.options.logit_bias for sampler in found),
        )

    def draw(self, rows: slice = slice(None)) -> None:
        """Prepare the next token: random numbers for the slots that sample, and the masks of constraints."""
        for slot, sampler in list(enumerate(self.samplers))[rows]:
            if sampler is None:
                continue
            if sampler.options.do_sample:
                noise = self.noise[slot].exponential_(generator=sampler.generator)
                noise.clamp_(min=torch.finfo(torch.float32).tiny)
            if sampler.constraint is not None and sampler.error is None:
                try:
                    allowed = sampler.constraint.allowed()
                except QvlError as error:
                    sampler.error = error
                    continue
                self.bias[slot] = self._bias(sampler).masked_fill(~allowed, -torch.inf)

    def accept(self, slot: int, token: int) -> TokenLogprob | None:
        """Advance `slot`'s constraint by the token; its log-probabilities, if requested."""
        sampler = self.samplers[slot]
        if sampler is None or token == NOT_FINITE:
            return None
        if sampler.constraint is not None and sampler.error is None:
            try:
                sampler.constraint.accept(token)
            except QvlError as error:
                sampler.error = error
        count = sampler.options.logprobs
        if count is None:
            return None
        chosen, *scores = self.scores[slot].tolist()
        tops = tuple(zip(self.likeliest[slot].tolist(), scores, strict=True))[:count]
        return TokenLogprob(token, chosen, tops)

    def choose(self, logits: Tensor, rows: slice = slice(None), kind: Kind | None = None) -> Tensor:
        """logits (b, vocab) float32 of the slots `rows` -> tokens (b,) int64.

        In order: constraint and logit_bias, repetition penalty, frequency and presence penalty, temperature, top_k,
        top_p, min_p. NOT_FINITE for a sequence with a logit that is NaN or inf. `seen` and `counts` are updated in
        place.
        """
        kind = kind or self.kind(rows)
        finite = logits.sum(1).isfinite()  # one NaN or inf makes the sum one
        logprobs = logits.log_softmax(1) if kind.scored else None  # the model's own, before any option
        if kind.biased:
            logits = logits + self.bias[rows]
        if kind.penalized:
            lower = torch.where(logits < 0, logits * self._repetition[rows], logits / self._repetition[rows])
            logits = torch.where(self.seen[rows], lower, logits)
            counts = self.counts[rows]
            logits = logits - counts * self._frequency[rows] - (counts > 0) * self._presence[rows]
        tokens = logits.argmax(1)
        if kind.sampled:
            tokens = torch.where(self._sample[rows, 0], self._pick(logits, rows, cut=kind.cut), tokens)
        if kind.penalized:
            self.seen[rows].scatter_(1, tokens[:, None], True)
            self.counts[rows].scatter_add_(1, tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.int32))
        if logprobs is not None:
            top = logprobs.topk(self.likeliest.shape[1], 1)
            self.scores[rows] = torch.cat((logprobs.gather(1, tokens[:, None]), top.values), 1)
            self.likeliest[rows] = top.indices
        return torch.where(finite, tokens, NOT_FINITE)

    def _pick(self, logits: Tensor, rows: slice, *, cut: bool) -> Tensor:
        """The token with the largest probability / noise, in logarithms: each with its probability (exponential race).

        The noise belongs to the token and not to its rank: a batch that rounds logits differently must not shift it.
        """
        logits = logits / self._temperature[rows]
        noise = self.noise[rows].log()
        if not cut:
            return (logits - noise).argmax(1)
        ordered, tokens = logits.sort(1, descending=True)
        ordered = ordered.masked_fill(ordered < ordered.gather(1, self._top_k[rows] - 1), -torch.inf)
        # a token is kept while those before it have not reached top_p; the first is always kept
        probabilities = ordered.softmax(1)
        ordered = ordered.masked_fill(probabilities.cumsum(1) - probabilities >= self._top_p[rows], -torch.inf)
        ordered = ordered.masked_fill(ordered < ordered[:, :1] + self._min_p[rows], -torch.inf)
        return tokens.gather(1, (ordered - noise.gather(1, tokens)).argmax(1, keepdim=True))[:, 0]


def check_logits(logits: Tensor, dtype: torch.dtype) -> None:
    """ConfigError if logits are NaN or inf. dtype: of the model's activations."""
    if not bool(logits.isfinite().all()):
        check_tokens([NOT_FINITE], dtype)


def check_tokens(tokens: Sequence[int], dtype: torch.dtype) -> None:
    """ConfigError if a token is NOT_FINITE."""
    if NOT_FINITE in tokens:
        cause = "its weights hold NaN or infinity; copy the checkpoint again, or take an earlier one of the training"
        if dtype == torch.float16:
            cause = "the model's numbers are too large for float16: use bfloat16; or " + cause
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(f"the logits of sequence {list(tokens).index(NOT_FINITE)} are not finite in {name}: {cause}")
