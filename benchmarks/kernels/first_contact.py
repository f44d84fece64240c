"""What only a card can answer, beside its kernels' errors and times: graphs, other threads, memory, and assumptions.

Each function yields records; those with "holds" are checks. On the CPU only what needs no CUDA runs, as a smoke test.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.decode_step import decoder_config
from benchmarks.kernels.problem import random_attention
from kernels import rotary_attention
from qvl_edge.engine.graph import BUCKETS, GRAPH_BYTES
from qvl_edge.engine.request import Request
from qvl_edge.engine.slots import Slots
from qvl_edge.model.fused import FusedDecoder
from qvl_edge.options import GenerationOptions

Record = dict[str, Any]
GREEDY = GenerationOptions(do_sample=False)
SAMPLED = GenerationOptions(seed=5, temperature=0.8, top_p=0.9, repetition_penalty=1.1)


def moved(value: Any, device: str) -> Any:
    """A decoder, or a part of one, with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, FusedDecoder):
        copy = object.__new__(FusedDecoder)
        copy.__dict__.update({name: moved(item, device) for name, item in vars(value).items()})
        return copy
    if is_dataclass(value) and not isinstance(value, type) and type(value).__module__ != "qvl_edge.config":
        return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})
    return value


def _begun(slots: Slots, length: int, seed: int, options: GenerationOptions) -> Request:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, slots.model.config.vocab_size, (length,), generator=generator).tolist()
    request = Request.of_ids(ids, options, device=slots.model.device)
    slots.begin(request)
    while slots.prefill(request) is None:
        pass
    return request


def check_tokens(device: str, tiny: bool) -> Iterator[Record]:
    """A whole small decoder: the CPU's greedy tokens by the definitions, and eager steps against graphs."""
    length, steps = (6, 2) if tiny else (40, 24)
    reference = FusedDecoder.random(decoder_config(tiny=True), device="cpu", seed=3)
    reference.backend = "torch"
    found = {}
    for name, model in (("cpu", reference), (device, moved(reference, device))):
        model.backend = "torch" if name == "cpu" and model is reference else "triton"
        slots = Slots(model, capacity=64, graph=False)
        request = _begun(slots, length, 1, GREEDY)
        found[model.backend] = [request.last, *(slots.step()[request] for _ in range(steps))]
    wrong = sum(one != other for one, other in zip(found["torch"], found["triton"], strict=True))
    # a random model's best two tokens are sometimes nearer than rounding moves them, and then all that follow differ
    yield _check("greedy tokens of the CPU's definitions", wrong / (steps + 1), 0.5)
    if device != "cuda":
        return
    model = moved(reference, device)
    model.backend = "triton"
    for length in (40, 511, 1023):  # the first step of a bucket at its last position
        for options in (GREEDY, SAMPLED):
            runs = []
            for graph in (False, True):
                slots = Slots(model, capacity=1100, count=6, graph=graph)
                crowd = [_begun(slots, length - index, index, options) for index in range(5)]
                said = [tuple(slots.step().values()) for _ in range(2)]
                for request in crowd[:4]:
                    slots.end(request)  # the last one moves to the leading slot
                runs.append([*said, *(slots.step()[crowd[4]] for _ in range(6))])
            wrong = sum(one != other for one, other in zip(*runs, strict=True))
            yield _check(f"graphs against eager steps, {length} tokens, sampled {options.do_sample}", wrong, 0.5)


def check_captures(device: str, tiny: bool) -> Iterator[Record]:
    """Graphs are captured while another thread allocates and frees, as onnxruntime does when it encodes a picture."""
    del tiny
    if device != "cuda":
        return
    stop, errors = threading.Event(), list[str]()

    def other() -> None:
        size = 1 << 20
        while not stop.is_set():
            try:
                torch.empty(size, dtype=torch.uint8, device=device)
                torch.cuda.empty_cache()  # cudaFree
                size += 1 << 20
            except RuntimeError as error:
                errors.append(str(error).partition("\n")[0])
                return

    thread = threading.Thread(target=other)
    thread.start()
    model = FusedDecoder.random(decoder_config(tiny=True), device=device)
    captured = 0
    try:
        for count in (1, 4):
            slots = Slots(model, capacity=2048, count=count, graph=True)
            requests = [_begun(slots, 30, seed, GREEDY) for seed in range(count)]
            slots.step()
            captured += len(requests) == count
    except RuntimeError as error:
        errors.append(str(error).partition("\n")[0])
    finally:
        stop.set()
        thread.join()
    yield _check("captures beside another thread's cudaMalloc and cudaFree", len(errors), 0.5) | {
        "captured": captured,
        "errors": errors[:2],
    }


def guesses(device: str, tiny: bool) -> Iterator[Record]:
    """What the budget and the design assume, measured: a graph's bytes, steps of prompt lookup, attention of a few
    tokens over a long cache, the largest row that a norm leaves."""
    model = FusedDecoder.random(decoder_config(tiny=tiny or device != "cuda"), device=device)
    if device == "cuda":
        slots = Slots(model, capacity=BUCKETS[2], graph=True)
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info()[0]
        requests = []
        for positions in BUCKETS[:3]:
            for options in (GREEDY, SAMPLED):
                request = _begun(slots, positions // 2 + 8, 2, options)
                slots.step()
                slots.end(request)
                requests.append(request)
        torch.cuda.synchronize()
        taken = (before - torch.cuda.mem_get_info()[0]) / len(requests)
        yield {"guess": "bytes of a graph, with its share of a step's tensors", "value": taken, "assumed": GRAPH_BYTES}
    context = 24 if tiny else 2048
    slots = Slots(model, capacity=context + 40, graph=None if device == "cuda" else False, lookup=8)
    request = _begun(slots, context, 4, GREEDY)
    slots.step()
    times = {}
    for name, run in (
        ("a step, ms", slots.step),
        ("a step of 8 guesses, ms", lambda: slots._verify(request, [1] * (2 if tiny else 8))),
    ):
        run()
        start = time.perf_counter()
        for _ in range(1 if tiny else 10):
            run()
        times[name] = 1e3 * (time.perf_counter() - start) / (1 if tiny else 10)
    yield {"guess": "steps of prompt lookup are eager", **times}
    heads, dim, capacity = (2, 32, 64) if tiny else (32, 128, 8192)
    for length in (1, 8):
        args = random_attention(heads, dim, capacity, (capacity - 16,), length, device=device, int8=False)
        rotary_attention(args, backend="triton")
        ms = _timed(lambda args=args: rotary_attention(args, backend="triton"), device, 1 if tiny else 20)
        yield {"guess": f"attention of {length} tokens over {capacity} positions", "ms": ms}


def whole_model(path: str, device: str) -> Iterator[Record]:
    """A bundle: the CPU's greedy tokens, the memory that was planned, the largest row, steps beside an encoder.

    Needs what the runtime needs, onnxruntime's provider for CUDA included.
    """
    from qvl_edge import Runtime
    from qvl_edge.engine.budget import estimate
    from qvl_edge.model import fused

    question: list[dict[str, Any]] = [
        {"image": torch.linspace(0, 255, 448 * 448 * 3).view(448, 448, 3).byte().numpy()},
        {"text": "Describe."},
    ]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "ignore_eos": True}
    tokens = {}
    for place in dict.fromkeys(("cpu", device)):
        if place == "cuda":
            torch.cuda.reset_peak_memory_stats()
        runtime = Runtime.from_pretrained(path, device=place, activations="float", max_context=1024)
        tokens[place] = runtime.answer(question, **options).token_ids
    shared = next((i for i, pair in enumerate(zip(*tokens.values(), strict=True)) if len(set(pair)) > 1), 24)
    yield _check("greedy tokens that differ from the CPU's, of 24", 24 - shared, 12.5)
    budget = estimate(runtime.config, runtime.plan)
    planned = budget.total - budget.runtime
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        yield {"guess": "bytes of a model", "value": total - free, "assumed": budget.total, "without runtime": planned}
    largest, real = [0.0], fused.int4_gemm_residual

    def watched(*args: Any, **named: Any) -> Any:
        rows = real(*args, **named)
        largest[0] = max(largest[0], float(rows.x.abs().max()))
        return rows

    fused.int4_gemm_residual = watched
    try:
        runtime.forget()
        runtime.answer([*question, {"text": " Again."}], do_sample=False, max_new_tokens=1)
    finally:
        fused.int4_gemm_residual = real
    yield _check("largest of residual x norm weight, in units of float16's 65,504", largest[0] / 65504, 0.5)
    times = {}
    for name, beside in (("alone", False), ("beside an encoder", True)):
        stop = threading.Event()

        def encode(stop: threading.Event = stop) -> None:
            size = runtime.config.visual.image_size
            while not stop.is_set():
                runtime.vision.encoder.encode(torch.randn(1, 3, size, size))

        thread = threading.Thread(target=encode)
        if beside:
            thread.start()
        start = time.perf_counter()
        count = len(runtime.answer("Count.", **options).token_ids)
        times[f"{name}, ms a token"] = 1e3 * (time.perf_counter() - start) / count
        stop.set()
        if beside:
            thread.join()
    yield {"guess": "an encoder's cudaMalloc and cudaFree do not stop steps", **times}


def _timed(run: Any, device: str, rounds: int) -> float:
    """Milliseconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / rounds


def _check(name: str, error: float, allowed: float) -> Record:
    return {"check": name, "error": float(error), "allowed": allowed, "holds": error < allowed}
