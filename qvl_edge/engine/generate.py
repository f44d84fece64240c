"""Prefill and decode: prompts as embeddings in, token ids out, a batch of sequences each at its own position."""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qvl_edge.engine.graph import Decoder, Decoding
from qvl_edge.engine.sampling import Sampler


def embed_prompt(model: Decoder, ids: list[int], image_starts: list[int], features: list[Tensor]) -> Tensor:
    """Embeddings (1, T, hidden) of a prompt with each image's features (256, hidden) written at its slots."""
    embeds = model.embed(torch.tensor([ids], device=model.device))
    for start, feature in zip(image_starts, features, strict=True):
        embeds[0, start : start + len(feature)] = feature.to(embeds)
    return embeds


@torch.inference_mode()
def generate(
    decoding: Decoding,
    prompts: Sequence[Tensor],
    samplers: Sequence[Sampler],
    *,
    stop_ids: frozenset[int],
    max_new_tokens: Sequence[int],
    capacity: int,
) -> Iterator[list[int | None]]:
    """Generate for B prompts at once; yield at every step the B new tokens, None for a sequence that has ended.

    prompts: embeddings (1, T_b, hidden), prefilled one after another, then decoded together, each at its own position.
    A sequence ends after a token in stop_ids (which is yielded) or after its max_new_tokens. PromptError if a prompt
    and its new tokens do not fit into `capacity` positions; ConfigError if logits are not finite.
    """
    step = decoding.take(samplers, capacity)
    try:
        prefilled = [decoding.model(prompt, step.cache.sequence(b)) for b, prompt in enumerate(prompts)]
        chosen = step.first(torch.cat(prefilled))
        running = [True] * len(prompts)
        for count in itertools.count(1):
            tokens = [token if runs else None for token, runs in zip(chosen, running, strict=True)]
            yield tokens
            running = [t is not None and t not in stop_ids and count < max_new_tokens[b] for b, t in enumerate(tokens)]
            if not any(running):
                return
            chosen = step.next([not runs for runs in running])
    finally:  # also where the caller stops early
        decoding.give_back(step)
