"""int4_gemm against other implementations on a CPU: python -m benchmarks.int4_gemm [--all] [--json FILE]

With OpenVINO too, where it is installed. Every candidate is checked against float64, then timed over enough copies of
its weight to exceed the caches: in a model a layer's weights come from memory. On CUDA, for benchmarks.gpu, all calls
of a round are one graph, as in the runtime, and the four projections of a layer are timed in their fused forms too.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import report
from benchmarks.kernels.problem import LAYER, Gemm, Problem, expect_below, relative_error
from benchmarks.kernels.timing import OUTGROWS_CACHES, Timing, measure
from kernels import Int4Weight, Rows, TritonWeight, int4_gemm, pack_for_cpu, pack_for_triton
from qvl_edge import markdown

# K, N of Qwen-7B's projections: c_attn first, then attn.c_proj, w1 and w2, mlp.c_proj
SHAPES = [(4096, 12288), (4096, 4096), (4096, 11008), (11008, 4096)]
CUDA_SHAPES = [(gemm.k, gemm.n) for gemm in LAYER]  # w1 and w2 are one weight there
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
GROUP_SIZE = 128
# bytes of weights to cycle through; desktop and server CPUs have caches of up to 32 to 100 MiB
COPIED = {"cpu": 192 * 2**20, "cuda": OUTGROWS_CACHES, "interpreter": 1}
CHECKED_ROWS = 4
# relative norm error against float64: float32 sums of 11,008 channels one after another, 2 * 2^-24 * sqrt(11,008 / 6);
# 16-bit weights and outputs, and in some libraries 16-bit partial sums
TOLERANCE = {torch.float32: 5.2e-6, torch.float16: 1.5e-3, torch.bfloat16: 6e-3}
ROUNDED = 1e-2  # with activations rounded to int8 in blocks of 128
OURS, TORCHS = "int4", "torch's int4 op, bfloat16"
# speeds are relative to the same GEMM without int4. "interpreter": CUDA's peers, as far as they run on a CPU
BASELINE = {"cpu": "float32", "cuda": "float16", "interpreter": "float16"}


@dataclass(frozen=True)
class Peer:
    """An implementation of x @ W.T."""

    call: Callable[[Any, Any], Tensor]  # on (x, weight)
    weights: list[Any]  # copies
    bytes_read: int  # of the weight, per call
    dtype: torch.dtype  # of x
    prepare: Callable[[Tensor], Any] = lambda x: x  # of x; not timed
    tolerance: float | None = None  # default: the dtype's


def random_weight(in_features: int, out_features: int, device: str = "cpu") -> Int4Weight:
    """A symmetric int4 weight, as in the published checkpoint, with random levels."""
    generator = torch.Generator(device).manual_seed(0)
    levels = torch.randint(0, 16, (in_features, out_features), dtype=torch.uint8, generator=generator, device=device)
    shape = (in_features // GROUP_SIZE, out_features)
    scales = (0.005 + 0.01 * torch.rand(shape, generator=generator, device=device)).half()
    zeros = torch.full(shape, 8, dtype=torch.int16, device=device)
    return Int4Weight.from_grouped(levels, scales, zeros, None)


def copies(make: Callable[[], Any], size: int, device: str = "cpu") -> list[Any]:
    """Enough copies of a weight of `size` bytes to exceed the caches."""
    return [make() for _ in range(-(-COPIED[device] // size))]


def cpu_peers(weight: Int4Weight) -> dict[str, Peer]:
    """The implementations on a CPU."""
    dense = weight.dequantize()
    half = dense.bfloat16()
    levels = weight.levels().T.to(torch.int32).contiguous()
    scales = weight.scales.bfloat16()
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=-1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    int4_bytes = weight.qweight.nbytes + weight.scales.nbytes

    def operator(x: Tensor, copy: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, copy, GROUP_SIZE, scales_and_zeros)

    peers = {
        BASELINE["cpu"]: Peer(F.linear, copies(dense.clone, dense.nbytes), dense.nbytes, torch.float32),
        "bfloat16": Peer(F.linear, copies(half.clone, half.nbytes), half.nbytes, torch.bfloat16),
        TORCHS: Peer(operator, copies(packed.clone, packed.nbytes), int4_bytes, torch.bfloat16),
        "definition": Peer(lambda x, w: int4_gemm(x, w, backend="torch"), [weight], int4_bytes, torch.float32),
    }
    for name, rounded in ((OURS, False), (f"{OURS}, int8 activations", True)):
        packed = copies(partial(pack_for_cpu, weight, "int8" if rounded else "float"), int4_bytes)
        peers[name] = Peer(int4_gemm, packed, int4_bytes, torch.float32, tolerance=ROUNDED if rounded else None)
    if importlib.util.find_spec("openvino"):
        for name, group in (("OpenVINO", 0), ("OpenVINO, int8 activations", GROUP_SIZE)):
            compiled = copies(partial(_openvino_product, weight, group), int4_bytes)
            tolerance = ROUNDED if group else None
            peers[name] = Peer(lambda x, run: run(x), compiled, int4_bytes, torch.float32, tolerance=tolerance)
    return peers


def _openvino_product(weight: Int4Weight, rounded: int) -> Callable[[Tensor], Tensor]:
    """As OpenVINO reads compressed weights; activations in int8 by groups of `rounded` channels, or in float32 if 0."""
    ov: Any = importlib.import_module("openvino")
    op: Any = importlib.import_module("openvino.opset13")
    n, k = weight.out_features, weight.in_features
    levels = weight.levels().T  # (N, K)
    grouped = ov.Shape([n, k // GROUP_SIZE, GROUP_SIZE])
    packed = (levels[:, 0::2] | levels[:, 1::2] << 4).flatten().numpy()  # which the constant does not copy
    scales = weight.scales.T[..., None].contiguous().numpy()
    middle = op.constant(ov.Tensor(np.full(1, 0x88, np.uint8), ov.Shape([1, 1, 1]), ov.Type.u4))
    centred = op.subtract(
        op.convert(op.constant(ov.Tensor(packed, grouped, ov.Type.u4)), "f16"), op.convert(middle, "f16")
    )
    dense = op.reshape(op.multiply(centred, op.constant(scales)), op.constant(np.array([n, k])), False)
    x = op.parameter(ov.PartialShape([-1, k]), ov.Type.f32)
    model = ov.Model([op.result(op.matmul(x, op.convert(dense, "f32"), False, True))], [x])
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(rounded),
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "NUM_STREAMS": "1",
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()

    def run(x: Tensor, kept: object = (packed, scales)) -> Tensor:  # the constants' memory
        request.infer([x.numpy()], share_inputs=True)
        return torch.from_numpy(request.get_output_tensor().data)

    return run


def cuda_peers(weight: Int4Weight, device: str) -> dict[str, Peer]:
    """The implementations on a CUDA device, with the libraries that are installed."""
    half = weight.dequantize().half()
    ours = pack_for_triton(weight)
    int4_bytes = ours.words.nbytes + ours.scales.nbytes
    levels = weight.levels().T.contiguous()  # (N, K)
    scales = weight.scales.T.contiguous()  # (N, G)

    def another() -> TritonWeight:
        return replace(ours, words=ours.words.clone(), scales=ours.scales.clone(), locks=ours.locks.clone())

    peers = {
        BASELINE["cuda"]: Peer(F.linear, copies(half.clone, half.nbytes, device), half.nbytes, torch.float16),
        # the runtime's kernels compute the rows' sums along with the rows
        OURS: Peer(
            partial(int4_gemm, backend="triton"),
            copies(another, int4_bytes, device),
            int4_bytes,
            torch.float16,
            prepare=_with_sums,
        ),
    }
    with suppress(NotImplementedError):  # a build of torch without it
        # W = (level - 8) * scale + zero, two levels per byte, the first in the high nibble
        packed = torch.ops.aten._convert_weight_to_int4pack(levels[:, ::2] << 4 | levels[:, 1::2], 8)
        parts = torch.stack((scales.T, torch.zeros_like(scales.T)), dim=-1).bfloat16().contiguous()

        def operator(x: Tensor, copy: Tensor) -> Tensor:
            return torch.ops.aten._weight_int4pack_mm(x, copy, GROUP_SIZE, parts)

        peers[TORCHS] = Peer(operator, copies(packed.clone, packed.nbytes, device), int4_bytes, torch.bfloat16)
    if importlib.util.find_spec("gemlite"):
        try:
            peers["gemlite"] = _gemlite_peer(levels, scales, int4_bytes)
        except Exception as error:  # another version's names, or no GPU; the others are measured
            peers["gemlite"] = _unable(f"{type(error).__name__}: {error}")
    return peers


def _unable(reason: str) -> Peer:
    """A peer that could not be set up: its first, untimed call raises the reason."""

    def call(x: Tensor, weight: None) -> Tensor:
        raise RuntimeError(reason)

    return Peer(call, [None], 0, torch.float16)


def _with_sums(x: Tensor) -> Rows:
    from kernels.gpu.gemm import rows_triton  # loads triton

    return rows_triton(x)


def _gemlite_peer(levels: Tensor, scales: Tensor, int4_bytes: int) -> Peer:
    """gemlite as in its README, with its own choice of tiles."""
    gemlite: Any = importlib.import_module("gemlite.core")  # looks for a GPU on import

    def layer() -> Any:
        n, k = levels.shape
        dtypes = {"input_dtype": gemlite.DType.FP16, "output_dtype": gemlite.DType.FP16}
        made = gemlite.GemLiteLinear(4, group_size=GROUP_SIZE, in_features=k, out_features=n, **dtypes)
        made.pack(levels, scales, torch.full_like(scales, 8), None)
        return made

    weights = copies(layer, int4_bytes, "cuda")
    return Peer(lambda x, layer: layer(x), weights, int4_bytes, torch.float16)


def check(name: str, peer: Peer, x: Tensor, expected: Tensor) -> float:
    """Relative norm error of the first rows against float64; SystemExit if it exceeds the tolerance."""
    y = peer.call(peer.prepare(x.to(peer.dtype)), peer.weights[0])[:CHECKED_ROWS]
    error = relative_error(y, expected[: len(y)])
    return expect_below(error, peer.tolerance or TOLERANCE[peer.dtype], f"{name}, {len(x)} rows")


def bench_shape(
    shape: tuple[int, int], rows: list[int], *, device: str, rounds: int, seconds: float, copy_rate: float | None = None
) -> Iterator[dict[str, Any]]:
    """One record per number of rows: every peer's timing, error, GB/s and speed relative to the device's baseline.

    copy_rate: GB/s of a device copy, to give each peer's share of it. "missing" has the reason why a peer cannot run.
    """
    where = "cuda" if device == "cuda" else "cpu"
    weight = random_weight(*shape, where)
    peers = cpu_peers(weight) if device == "cpu" else cuda_peers(weight, device)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(max(rows), shape[0], generator=generator)
    # exact in bfloat16 too, so that one reference serves every dtype
    inputs = inputs.bfloat16().float().to(where)
    expected = inputs[:CHECKED_ROWS].double() @ weight.dequantize().double().T
    del weight
    missing: dict[str, str] = {}
    for count in rows:
        x = inputs[:count]
        errors: dict[str, float] = {}
        for name, peer in list(peers.items()):
            try:
                errors[name] = check(name, peer, x, expected)
            except (RuntimeError, NotImplementedError, SystemExit) as error:
                if name in (OURS, BASELINE[device]) or isinstance(error, torch.OutOfMemoryError):
                    raise
                missing[name] = str(error).splitlines()[0]
                del peers[name]
        if device == "cpu":  # OpenVINO prepares each copy at its first call with so many rows
            for peer in peers.values():
                for copy in peer.weights:
                    peer.call(peer.prepare(x.to(peer.dtype)), copy)
        calls = {name: _calls(peers[name], x, device) for name in errors}
        timings = measure(calls, device=device, rounds=rounds, seconds=seconds)
        baseline = timings[BASELINE[device]].median_ms
        record: dict[str, Any] = {"in_features": shape[0], "out_features": shape[1], "rows": count, "peers": {}}
        for name, timing in timings.items():
            rate = peers[name].bytes_read / timing.median_ms / 1e6
            figures = {"error": errors[name], "gb_per_s": rate, "speed": baseline / timing.median_ms}
            if copy_rate is not None:
                flops = 2 * count * shape[0] * shape[1]
                figures |= {"share_of_copy": rate / copy_rate, "tflop_per_s": flops / timing.median_ms / 1e9}
            record["peers"][name] = asdict(timing) | figures
        yield record | ({"missing": dict(missing)} if missing else {})


def _calls(peer: Peer, x: Tensor, device: str) -> list[Callable[[], object]]:
    """Calls of one round, over all copies of the weight in turn."""
    count = 1
    if device == "cuda":  # with many rows calls are long, and caches do not matter
        count = max(len(peer.weights), 16) if len(x) <= 64 else min(len(peer.weights), 4)
    x, weights = peer.prepare(x.to(peer.dtype)), cycle(peer.weights)
    return [lambda: peer.call(x, next(weights))] * count


def bench_layer(
    count: int,
    *,
    rounds: int,
    seconds: float,
    copy_rate: float | None,
    device: str = "cuda",
    projections: Sequence[Gemm] = LAYER,
) -> dict[str, Any]:
    """The four projections of a layer as launched by the runtime, fused norm, bias, SwiGLU and residual included.

    Each in its own graph, over enough weights to exceed the caches; "layer_us" is their sum. Interpreted on the CPU.
    """
    calls: dict[str, list[Callable[[], object]]] = {}
    parts: dict[str, dict[str, Any]] = {}
    for gemm in projections:
        problem = Problem.random(gemm, count, device=device)
        error = problem.checked()
        copies = problem.copies(1 if device != "cuda" else None if count <= 64 else 4)
        parts[gemm.name] = {"error": error, "calls": len(copies), "bytes": problem.bytes_read}
        calls[gemm.name] = [one.run for one in copies]
    for name, timing in measure(calls, device=device, rounds=rounds, seconds=seconds).items():
        part = parts[name]
        part |= timing.us()
        part["gb_per_s"] = part["bytes"] / part["us"] / 1e3
        if copy_rate is not None:
            part["share_of_copy"] = part["gb_per_s"] / copy_rate
    return {"rows": count, "layer_us": sum(part["us"] for part in parts.values()), "projections": parts}


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: per shape and rows, each peer's median and quartiles in ms, and speed relative to the baseline."""
    names = list(records[0]["peers"])
    rows = []
    for record in records:
        peers = record["peers"]
        fields = ("median_ms", "low_ms", "high_ms", "rounds")
        times = [str(Timing(*(peers[n][f] for f in fields))) if n in peers else "" for n in names]
        rates = [f"{peers[OURS]['gb_per_s']:.1f}", f"{peers[OURS]['speed']:.2f}"]
        rows.append([f"{record['in_features']} x {record['out_features']}", record["rows"], *times, *rates])
    return markdown.table(["K x N", "rows", *(f"{name}, ms" for name in names), "int4 GB/s", "int4 speed"], rows)


def main(arguments: list[str] | None = None) -> None:
    parser = report.command("int4_gemm", __doc__)
    parser.add_argument("--all", action="store_true", help="all four shapes of the model")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rows of x (default: 1 to 512)")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls per candidate (default: 15)")
    parser.add_argument("--seconds", type=float, default=3.0, help="at most, per candidate and rows (default: 3)")
    report.add_save(parser)
    args = parser.parse_args(arguments)
    records = []
    with torch.inference_mode():
        for shape in SHAPES if args.all else SHAPES[:1]:
            for record in bench_shape(shape, args.rows, device="cpu", rounds=args.rounds, seconds=args.seconds):
                speed = record["peers"][OURS]["speed"]
                report.say(f"{shape[0]} x {shape[1]}, {record['rows']} rows: {speed:.2f} of {BASELINE['cpu']}")
                records.append(record)
    report.print_machine("cpu")
    print(f"Median (quartiles); speed is relative to {BASELINE['cpu']} in the same run.\n\n{table(records)}")
    report.save(args.json, "int4_gemm", "cpu", group_size=GROUP_SIZE, records=records)


if __name__ == "__main__":
    main()
