"""The next token from logits, as transformers' logits processors do it and in their order."""

import torch
from torch import Tensor

from qvl_edge.engine.options import GenerationOptions


class Sampler:
    """Chooses the tokens of one sequence; holds its random state and the tokens it has seen."""

    def __init__(self, options: GenerationOptions, prompt_ids: list[int], *, device: torch.device | str = "cpu"):
        self.options = options
        self.seen = torch.tensor(sorted(set(prompt_ids)), dtype=torch.int64, device=device)
        self.generator = torch.Generator(device=device)
        if options.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(options.seed)

    def choose(self, logits: Tensor) -> int:
        """logits (vocab,) float32 -> token id. Repetition penalty, then temperature, top_k, top_p."""
        options = self.options
        if options.repetition_penalty != 1.0:
            logits = logits.clone()
            seen = logits[self.seen]
            logits[self.seen] = torch.where(
                seen < 0, seen * options.repetition_penalty, seen / options.repetition_penalty
            )
        token = self._sample(logits) if options.do_sample else int(logits.argmax())
        if options.repetition_penalty != 1.0:
            self.seen = torch.cat((self.seen, self.seen.new_tensor([token]))).unique()
        return token

    def _sample(self, logits: Tensor) -> int:
        options = self.options
        ordered, tokens = (logits / options.temperature).sort(descending=True)
        if options.top_k:
            ordered, tokens = ordered[: options.top_k], tokens[: options.top_k]
        probabilities = ordered.softmax(-1)
        # a token stays while those before it have not reached top_p; the first always stays
        probabilities[probabilities.cumsum(-1) - probabilities >= options.top_p] = 0
        return int(tokens[torch.multinomial(probabilities, 1, generator=self.generator)])
