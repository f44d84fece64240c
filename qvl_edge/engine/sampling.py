"""The next token from logits, as transformers' logits processors do it and in their order.

Everything stays on the logits' device and waits for nothing, so that a CUDA graph can hold it: chances come from noise
that is drawn beforehand, each sequence's from its own generator. A sequence gets the same tokens alone and in a batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qvl_edge.engine.options import GenerationOptions
from qvl_edge.errors import ConfigError

NOT_FINITE = -1  # stands for a token where the logits are no numbers


class Sampler:
    """How one sequence's tokens are chosen: its options, its random state, and what its prompt has said."""

    def __init__(self, options: GenerationOptions, prompt_ids: Sequence[int], *, device: torch.device | str = "cpu"):
        self.options, self.prompt_ids = options, list(prompt_ids)
        self.generator = torch.Generator(device=device)
        if options.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(options.seed)


class Samplers:
    """The choice for a batch: one tensor a setting, made once; `noise` and `seen` change from step to step.

    seen (B, vocab) bool: tokens that the repetition penalty is for. noise (B, vocab) float32: exponential variates.
    """

    def __init__(self, samplers: Sequence[Sampler], vocab: int, *, device: torch.device | str = "cpu"):
        batch, self.vocab = len(samplers), vocab
        self.sampled, self.cut, self.penalized = self.kind_of(samplers)
        self._sample = torch.zeros(batch, 1, dtype=torch.bool, device=device)
        self._penalty, self._temperature, self._top_p = torch.ones(3, batch, 1, device=device)
        self._top_k = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.seen = torch.zeros(batch if self.penalized else 0, vocab, dtype=torch.bool, device=device)
        self.noise = torch.ones(batch if self.sampled else 0, vocab, device=device)
        self.load(samplers)

    @staticmethod
    def kind_of(samplers: Sequence[Sampler]) -> tuple[bool, bool, bool]:
        """Whether any sequence samples, from less than all tokens, has a penalty: what a CUDA graph is recorded for."""
        options = [sampler.options for sampler in samplers]
        return (
            any(o.do_sample for o in options),
            any(o.do_sample and (o.top_k > 0 or o.top_p < 1.0) for o in options),
            any(o.repetition_penalty != 1.0 for o in options),
        )

    def load(self, samplers: Sequence[Sampler]) -> None:
        """Take the settings of other sequences, as many and of the same kind, into the same tensors."""
        assert len(samplers) == len(self._sample) and self.kind_of(samplers) == (self.sampled, self.cut, self.penalized)
        self.samplers = list(samplers)
        options = [sampler.options for sampler in samplers]
        for tensor, values in (
            (self._sample, [option.do_sample for option in options]),
            (self._penalty, [option.repetition_penalty for option in options]),
            (self._temperature, [option.temperature for option in options]),
            # the sum of all chances may round to more than 1
            (self._top_p, [option.top_p if option.top_p < 1.0 else 2.0 for option in options]),
            (self._top_k, [min(option.top_k or self.vocab, self.vocab) for option in options]),
        ):
            tensor.copy_(torch.tensor(values)[:, None])
        self.seen.zero_()
        for row, sampler in zip(self.seen, samplers, strict=False):
            row[torch.tensor(sampler.prompt_ids, dtype=torch.int64, device=row.device)] = True

    def draw(self) -> None:
        """New noise for the next choice, for the sequences that sample."""
        for row, sampler in zip(self.noise, self.samplers, strict=False):
            if sampler.options.do_sample:
                row.exponential_(generator=sampler.generator).clamp_(min=torch.finfo(torch.float32).tiny)

    def choose(self, logits: Tensor) -> Tensor:
        """logits (B, vocab) float32 -> tokens (B,) int64: repetition penalty, then temperature, top_k, top_p.

        NOT_FINITE for a sequence with a logit that is no number. `seen` is updated in place.
        """
        finite = logits.sum(1).isfinite()  # a sum with one number that is not finite is not either
        if self.penalized:
            lower = torch.where(logits < 0, logits * self._penalty, logits / self._penalty)
            logits = torch.where(self.seen, lower, logits)
        tokens = logits.argmax(1)
        if self.sampled:
            tokens = torch.where(self._sample[:, 0], self._pick(logits), tokens)
        if self.penalized:
            self.seen.scatter_(1, tokens[:, None], True)
        return torch.where(finite, tokens, NOT_FINITE)

    def _pick(self, logits: Tensor) -> Tensor:
        """The token whose chance / noise is largest, as logarithms: that is each with its chance (exponential race).

        A token's noise is its own and not its rank's: logits that a batch rounds otherwise must not shift it.
        """
        logits = logits / self._temperature
        noise = self.noise.log()
        if not self.cut:
            return (logits - noise).argmax(1)
        ordered, tokens = logits.sort(1, descending=True)
        ordered = ordered.masked_fill(ordered < ordered.gather(1, self._top_k - 1), -torch.inf)
        # a token stays while those before it have not reached top_p; the first always stays
        chances = ordered.softmax(1)
        ordered = ordered.masked_fill(chances.cumsum(1) - chances >= self._top_p, -torch.inf)
        return tokens.gather(1, (ordered - noise.gather(1, tokens)).argmax(1, keepdim=True))[:, 0]


def check_tokens(tokens: Sequence[int]) -> None:
    """ConfigError if a token stands for logits that are no numbers."""
    if NOT_FINITE in tokens:
        raise ConfigError(
            f"the logits of sequence {list(tokens).index(NOT_FINITE)} are not finite: the model's numbers are too "
            "large for float16, or its weights are damaged; use bfloat16"
        )
