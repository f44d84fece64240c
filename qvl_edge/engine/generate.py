"""Prefill and decode: prompts as embeddings in, token ids out, a batch of sequences each at its own position."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qvl_edge.engine.sampling import Sampler
from qvl_edge.model.cache import KVCache
from qvl_edge.model.decoder import QWenLMHeadModel


def embed_prompt(model: QWenLMHeadModel, ids: list[int], image_starts: list[int], features: list[Tensor]) -> Tensor:
    """Embeddings (1, T, hidden) of a prompt with each image's features (256, hidden) written at its slots."""
    embeds = model.embed(torch.tensor([ids], device=model.lm_head.weight.device))
    for start, feature in zip(image_starts, features, strict=True):
        embeds[0, start : start + len(feature)] = feature.to(embeds)
    return embeds


@torch.inference_mode()
def generate(
    model: QWenLMHeadModel,
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
    and its new tokens do not fit into `capacity` positions.
    """
    weight = model.lm_head.weight
    cache = KVCache(model.config, len(prompts), capacity, dtype=weight.dtype, device=weight.device)
    logits = torch.cat([model(prompt, cache.sequence(b)) for b, prompt in enumerate(prompts)])
    running = [True] * len(prompts)
    step = 0
    while True:
        tokens: list[int | None] = [
            sampler.choose(logits[b]) if running[b] else None for b, sampler in enumerate(samplers)
        ]
        yield tokens
        step += 1
        running = [t is not None and t not in stop_ids and step < max_new_tokens[b] for b, t in enumerate(tokens)]
        if not any(running):
            return
        ended = torch.tensor([not r for r in running], device=weight.device)
        # an ended sequence goes along at a place that it has already; its cache does not grow
        cache.lengths -= ended.to(cache.lengths.dtype)
        ids = torch.tensor([[t if t is not None else 0] for t in tokens], device=weight.device)
        logits = model(model.embed(ids), cache)
