"""Prompts in, token ids out: sequences that begin together and decode together."""

import itertools
from collections.abc import Generator, Sequence

from qvl_edge.engine.inputs import Inputs
from qvl_edge.engine.sampling import Sampler, check_tokens
from qvl_edge.engine.slots import Slots


def generate(
    slots: Slots,
    prompts: Sequence[Inputs],
    samplers: Sequence[Sampler],
    *,
    stop_ids: frozenset[int],
    max_new_tokens: Sequence[int],
) -> Generator[list[int | None], None, None]:
    """Generate for B prompts at once; yield at every step the B new tokens, None for a sequence that has ended.

    A prompt is prefilled in chunks, one prompt after another; then all decode together. A sequence ends after a token
    in stop_ids (which is yielded) or after its max_new_tokens. PromptError if a prompt and its new tokens do not fit
    into a slot; ConfigError if logits are not finite.
    """
    sequences = []
    try:
        for prompt, sampler in zip(prompts, samplers, strict=True):
            sequences.append(slots.begin(prompt, sampler))
        tokens: list[list[int]] = []
        for sequence in sequences:
            while (first := slots.prefill(sequence)) is None:
                pass
            tokens.append([first])
        counts = [0] * len(sequences)
        while True:
            for row in itertools.zip_longest(*tokens):  # more than one of them where a lone sequence guessed right
                check_tokens([0 if token is None else token for token in row])
                yield list(row)
                for index, (sequence, token) in enumerate(zip(sequences, row, strict=True)):
                    counts[index] += token is not None
                    if token is not None and (token in stop_ids or counts[index] >= max_new_tokens[index]):
                        slots.end(sequence)
                if not any(sequence.running for sequence in sequences):
                    return
            found = slots.advance()
            tokens = [found.get(sequence, []) for sequence in sequences]
    finally:  # also where the caller stops early
        for sequence in sequences:
            slots.end(sequence)
