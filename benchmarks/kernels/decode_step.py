"""Decode steps of a full-size decoder with random weights.

The published shapes, created on the device. A step is the runtime's own (qvl_edge/engine/graph.py), until the next
tokens are on the host, as a CUDA graph and eagerly; both must give the same tokens before they are timed.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.kernels.timing import Timing
from kernels import pack_for_triton, quantize_int8
from qvl_edge.config import Config
from qvl_edge.engine.request import Request
from qvl_edge.engine.slots import Slots
from qvl_edge.model.fused import FusedDecoder
from qvl_edge.options import GenerationOptions
from qvl_edge.published import CONFIG

CACHES = {"float16": torch.float16, "int8": torch.int8}
COMPARED = 4  # steps whose tokens must be the same in graph and eager mode
GREEDY = GenerationOptions(do_sample=False)


def decoder_config(tiny: bool) -> Config:
    """Qwen-VL-Chat's config.json as published, or a small one."""
    if not tiny:
        return Config.from_dict(CONFIG)
    visual = {**CONFIG["visual"], "image_start_id": 433, "output_dim": 128}
    sizes = {"hidden_size": 128, "kv_channels": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    return Config.from_dict({**CONFIG, **sizes, "intermediate_size": 512, "vocab_size": 512, "visual": visual})


@dataclass(frozen=True)
class Case:
    """One measurement."""

    context: int
    batch: int = 1
    head: str = "float16"
    cache: str = "float16"
    graph: bool = True


def cases(tiny: bool, cuda: bool) -> list[Case]:
    """The most informative first."""
    if tiny:
        found = [Case(40), Case(40, batch=2, head="int8", cache="int8")]
    else:
        found = [Case(256), Case(256, graph=False), Case(2048), Case(8192), Case(256, head="int8")]
        found += [Case(context, batch) for batch in (16, 4) for context in (256, 2048, 8192)]
        found += [Case(context, head="int8", cache="int8") for context in (256, 2048, 8192)]
        found += [Case(context, batch, "int8", "int8") for batch in (16, 4) for context in (2048, 8192)]
        found += [Case(2048, graph=False), Case(256, 16, graph=False)]
    return found if cuda else [replace(case, graph=False) for case in found]


class StepBench:
    """Times decode steps, with either head over the same blocks."""

    def __init__(self, device: str, *, tiny: bool):
        self.device = torch.device(device)
        self.config = decoder_config(tiny)
        self.decoders = {"float16": FusedDecoder.random(self.config, device=device)}

    def decoder(self, head: str) -> FusedDecoder:
        """The decoder with this head; an int8 one is made on first use."""
        if head not in self.decoders:
            exact = self.decoders["float16"]
            assert isinstance(exact.lm_head, torch.Tensor)
            lm_head = pack_for_triton(quantize_int8(exact.lm_head))
            self.decoders[head] = FusedDecoder(
                self.config, wte=exact.wte, blocks=exact.blocks, ln_f=exact.ln_f, lm_head=lm_head
            )
        return self.decoders[head]

    def slots(self, case: Case, steps: int, *, graph: bool) -> Slots:
        """Running requests over random keys and values, whose next `steps` tokens end the context."""
        slots = Slots(
            self.decoder(case.head), capacity=case.context, count=case.batch, kv_cache=CACHES[case.cache], graph=graph
        )
        cache, generator = slots.cache, torch.Generator(self.device).manual_seed(1)
        for tensor in (cache.k, cache.v):
            for layer in tensor:  # layer by layer: no temporary of the whole cache's size
                if tensor.dtype == torch.int8:
                    layer.random_(-127, 128, generator=generator)
                else:
                    layer.normal_(generator=generator)
        for scales in (cache.k_scales, cache.v_scales):
            if scales is not None:
                scales.fill_(1 / 74)  # values of float16's magnitude
        for number in range(case.batch):
            ids = [number] + [0] * (case.context - steps - 1)  # no two share a prefix
            request = Request.of_ids(ids, GREEDY, device=self.device)
            slots.begin(request)
            request.held += request.elements[:-1]  # as if prefilled: the cache is random
            slots.prefill(request)
        return slots

    def bytes_a_step(self, case: Case) -> int:
        """Bytes that a step reads: weights, head and cache."""
        decoder = self.decoder(case.head)
        blocks = sum(
            part.weight.words.nbytes + part.weight.scales.nbytes
            for block in decoder.blocks
            for part in (block.c_attn, block.attn_c_proj, block.w1_w2, block.mlp_c_proj)
        )
        return blocks + decoder.lm_head.nbytes + self.cache_bytes(case)

    def cache_bytes(self, case: Case) -> int:
        """Of the keys and values of all sequences."""
        config, itemsize = self.config, CACHES[case.cache].itemsize
        row = config.hidden_size * itemsize + (2 * config.num_attention_heads if itemsize == 1 else 0)
        return 2 * config.num_hidden_layers * case.batch * case.context * row

    def run(self, case: Case, *, rounds: int) -> dict[str, Any]:
        """Timing, tokens/s and GB/s of `rounds` steps. SystemExit if graph and eager mode give different tokens."""
        eager_tokens: list[list[int]] = []
        first = COMPARED if case.graph else 1
        if case.graph:
            eager = self.slots(case, rounds + first, graph=False)
            eager_tokens = [list(eager.step().values()) for _ in range(first)]
            del eager
        slots = self.slots(case, rounds + first, graph=case.graph)
        tokens = [list(slots.step().values()) for _ in range(first)]
        if case.graph and tokens != eager_tokens:
            raise SystemExit(f"{case}: the graph gives {tokens}, eager steps give {eager_tokens}")
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            slots.step()  # ends with the tokens on the host
            times.append(time.perf_counter() - start)
        timing = Timing.of(times)
        return asdict(timing) | {
            "tokens_per_s": 1000 * case.batch / timing.median_ms,
            "gb_per_s": self.bytes_a_step(case) / timing.median_ms / 1e6,
        }


def records(device: str, *, tiny: bool, rounds: int, copy_rate: float | None) -> Iterator[dict[str, Any]]:
    """One record per case, yielded when measured; "skipped" in it if it does not fit into memory."""
    bench = StepBench(device, tiny=tiny)
    for case in cases(tiny, device == "cuda"):
        record: dict[str, Any] = {**vars(case)}
        needed = bench.cache_bytes(case)
        try:
            if device == "cuda":
                torch.cuda.empty_cache()
                free = torch.cuda.mem_get_info()[0]
                if needed + 2**30 > free:
                    message = f"the cache takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free"
                    raise torch.OutOfMemoryError(message)
                torch.cuda.reset_peak_memory_stats()
            record |= bench.run(case, rounds=rounds)
        except torch.OutOfMemoryError as error:
            yield record | {"skipped": f"does not fit into memory: {error}".split(". ")[0]}
            continue
        if device == "cuda":
            record["peak_bytes"] = torch.cuda.max_memory_allocated()
        if copy_rate is not None:
            record["share_of_copy"] = record["gb_per_s"] / copy_rate
        yield record
