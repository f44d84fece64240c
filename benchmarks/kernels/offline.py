"""Compile the GPU kernels for an NVIDIA architecture on any machine, and read the machine code: no GPU, no driver.

A launch is recorded from the project's own launchers, called on tensors without memory (device "meta"), so that what is
compiled here is what a GPU would run: the same constants, types and alignments. The assembler and disassembler are
those that Triton ships. TRITON_INTERPRET must not be set when the kernels are imported.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton._utils import canonicalize_dtype
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.kernels.control_bits import Step, read_steps
from benchmarks.kernels.problem import Gemm, weight_of
from kernels.gpu.tiles import TURING_ROWS, DeviceKey, Tile
from kernels.reference import MAX_DECODE_ROWS, SPAN, AttentionArgs, Rows

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
HEADS, HEAD_DIM, CAPACITY = 32, 128, 2048  # of Qwen-7B's attention, and a cache
SQUARES = 32  # parts of a row's sum of squares, as attn.c_proj's 32 tiles of 128 leave them
CONVERSIONS = ("I2F", "I2FP", "I2HP")  # integer to float, on a pipe with a fraction of the others' rate
LOADS = ("LDG", "LDGSTS")  # from global memory

# instructions a weight as published (float16, groups of 128, symmetric), by block_m
WEIGHT_LIMITS = {1: 4.0, 2: 4.0, 4: 4.0, 8: 2.5, 16: 3.0}

# by compute capability: bytes of shared memory that one program may use (a multiprocessor has 1 KiB more); resident
# warps and programs per multiprocessor (CUDA programming guide, technical specifications per compute capability)
SHARED = {75: 65_536, 80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 120: 101_376}
WARPS = {75: 32, 80: 64, 86: 48, 87: 48, 89: 48, 90: 64, 120: 48}
PROGRAMS = {75: 16, 80: 32, 86: 16, 87: 16, 89: 24, 90: 32, 120: 24}


@dataclass(frozen=True)
class Gpu:
    """A GPU's published specifications."""

    name: str
    capability: int  # 86 for sm_86
    multiprocessors: int
    gb_per_s: float  # of memory
    ghz: float  # boost clock

    @property
    def key(self) -> DeviceKey:
        """What tiles are chosen by."""
        return DeviceKey(divmod(self.capability, 10), self.multiprocessors, SHARED[self.capability])

    def resident(self, registers: int, shared: int, num_warps: int) -> int:
        """Programs resident on one multiprocessor."""
        return min(
            65_536 // (-(-registers // 8) * 8 * 32 * num_warps),  # registers are allocated 8 at a time
            # the system takes 1 KiB per program, on Turing none
            (SHARED[self.capability] + 1024 * (self.capability >= 80))
            // (shared + 1024 * (self.capability >= 80) or 1),
            WARPS[self.capability] // num_warps,
            PROGRAMS[self.capability],
        )


# one or two of each family; another GPU takes the tiles of the nearest, with splits that fill it (kernels/gpu/tiles.py)
GPUS = (
    Gpu("NVIDIA GeForce RTX 2060", 75, 30, 336, 1.68),
    Gpu("Tesla T4", 75, 40, 320, 1.59),
    Gpu("NVIDIA A100-SXM4-80GB", 80, 108, 2039, 1.41),
    Gpu("NVIDIA GeForce RTX 3060", 86, 28, 360, 1.78),
    Gpu("Orin (AGX, 64 GB)", 87, 16, 204, 1.30),
    Gpu("NVIDIA GeForce RTX 4060", 89, 24, 272, 2.46),
    Gpu("NVIDIA GeForce RTX 4070", 89, 46, 504, 2.48),
    Gpu("NVIDIA GeForce RTX 4090", 89, 128, 1008, 2.52),
    Gpu("NVIDIA H200", 90, 132, 4800, 1.75),
    Gpu("NVIDIA GeForce RTX 5060", 120, 30, 448, 2.50),
    Gpu("NVIDIA GeForce RTX 5070", 120, 48, 672, 2.51),
)


@dataclass(frozen=True)
class Launch:
    """The arguments of `triton.compile` for one launch; picklable, and equal launches compile to the same code."""

    kernel: str  # "module:function"
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]  # arguments that are multiples of 16: pointers, and sizes where they are
    options: tuple[tuple[str, Any], ...]  # num_warps, num_stages, …

    @property
    def function(self) -> JITFunction:
        """The jit function itself."""
        module, name = self.kernel.split(":")
        function: JITFunction = getattr(import_module(module), name)
        return function


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Append kernel launches to the yielded list instead of running them."""
    launches: list[Launch] = []

    def record(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        del grid, warmup
        launches.append(_launch(self, arguments, named))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def record_one(kernel: str, launcher: Callable[..., Any], *arguments: Any, **named: Any) -> Launch:
    """The launch of the jit function named `kernel` that `launcher` makes."""
    with recorded() as launches:
        launcher(*arguments, **named)
    return next(launch for launch in launches if launch.kernel.endswith(f":{kernel}"))


def _launch(function: JITFunction, arguments: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    """Specialized as by JITFunction.run: None and 1 become constants, multiples of 16 are marked as aligned."""
    values = dict(zip(function.arg_names, arguments, strict=False))
    values |= {name: named.pop(name) for name in list(named) if name in function.arg_names}
    signature, constants, aligned = [], [], []
    for parameter in function.params:
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature.append((name, "constexpr"))
            # the launchers widen for the interpreter where a tensor is not on CUDA, which "meta" is not
            constants.append((name, False if name == "WIDEN" else value))
        elif isinstance(value, Tensor):
            signature.append((name, "*" + canonicalize_dtype(value.dtype)))
            aligned.append(name)  # torch's allocator aligns to 512 bytes, and the views that are passed keep 16
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                aligned.append(name)
    where = f"{function.fn.__module__}:{function.fn.__name__}"
    return Launch(where, tuple(signature), tuple(constants), tuple(aligned), tuple(sorted(named.items())))


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def gemm_launch(gemm: Gemm, tile: Tile, dtype: torch.dtype = torch.float16, *, one_row: bool = False) -> Launch:
    """The launch of `gemm` with `tile`, as the runtime makes it: with all its rows, or one of the first layer.

    Two splits stand for any number above one: the loop is the same. One row, and the one part of its squares that the
    first layer has, become constants of the kernel.
    """
    from kernels.gpu.gemm import gemm_triton

    tile = replace(tile, split_k=min(tile.split_k, 2))
    rows, parts = (1, 1) if one_row else (tile.block_m, SQUARES)
    few = rows <= MAX_DECODE_ROWS
    residual = gemm.epilogue == "residual"
    turing = tile.block_m in TURING_ROWS
    return record_one(
        "few_rows_kernel" if turing else "_decode_kernel" if few else "_prefill_kernel",
        gemm_triton,
        Rows(
            meta(rows, gemm.k, dtype=dtype),
            meta(gemm.k // SPAN, MAX_DECODE_ROWS, dtype=torch.float32) if few else None,
            meta(rows, parts, dtype=torch.float32) if gemm.norm else None,
            1e-6,
        ),
        weight_of(gemm, device="meta"),
        meta(gemm.outputs, dtype=dtype) if gemm.bias else None,
        epilogue=gemm.epilogue,
        residual=meta(rows, gemm.outputs, dtype=torch.float32) if residual else None,
        norm_weight=meta(gemm.outputs, dtype=dtype) if residual else None,
        out_dtype=torch.float32 if gemm.bits == 8 else None,
        tile=tile,
    )


def attention_launch(
    kernel: str, cache: torch.dtype, length: int, *, splits: int | None = None, logn: bool = True
) -> Launch:
    """The launch of an attention kernel for `length` tokens of two sequences."""
    from kernels.gpu.attention import attention_triton

    dtype = torch.float16 if cache == torch.int8 else cache
    scales = [meta(2, HEADS, CAPACITY) if cache == torch.int8 else None for _ in range(2)]
    q, k, v = meta(2, length, 3, HEADS, HEAD_DIM, dtype=dtype).unbind(2)
    cos, sin = (meta(2, length, HEAD_DIM, dtype=torch.float32) for _ in range(2))
    k_cache, v_cache = (meta(2, HEADS, CAPACITY, HEAD_DIM, dtype=cache) for _ in range(2))
    args = AttentionArgs(
        q, k, v, cos, sin, k_cache, v_cache,
        meta(2, dtype=torch.int64),
        q_scale=meta(2, length, dtype=torch.float32) if logn else None,
        k_scales=scales[0],
        v_scales=scales[1],
    )  # fmt: skip
    sums = meta(HEADS * HEAD_DIM // SPAN, MAX_DECODE_ROWS, dtype=torch.float32) if length == 1 else None
    return record_one(kernel, attention_triton, args, splits=splits, sums=sums)


@dataclass(frozen=True)
class Loop:
    """One iteration of a kernel's main loop, without NOPs."""

    length: int  # instructions
    counts: dict[str, int]  # by name without modifiers
    loads: dict[str, int]  # loads from global memory by name and bytes per thread: "LDG 4", "LDGSTS 16", …
    products: int  # multiplications by tensor cores, for one warp

    @classmethod
    def of(cls, names: list[str]) -> "Loop":
        """Count the instructions of one iteration, given with their modifiers."""
        counts = Counter(name.split(".")[0] for name in names)
        loads = Counter(_load(name) for name in names if name.split(".")[0] in LOADS)
        return cls(len(names), dict(counts), dict(loads), sum(map(_products, names)))

    def loaded(self, size: int, *, into: tuple[str, ...] = LOADS) -> int:
        """Bytes that come in loads of `size` bytes, into registers ("LDG") or shared memory ("LDGSTS")."""
        return sum(size * self.loads.get(f"{name} {size}", 0) for name in into)

    @property
    def conversions(self) -> int:
        """Conversions of integers to floats."""
        return sum(self.counts.get(name, 0) for name in CONVERSIONS)


def _load(name: str) -> str:
    parts = name.split(".")
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return f"{parts[0]} {next((size for part, size in widths.items() if part in parts), 4)}"


def _products(name: str) -> int:
    """HMMA.16816 multiplies 16 x 16 by 16 x 8; HGMMA.64xNx16 multiplies 64 x 16 by 16 x N, by four warps together."""
    if name.startswith("HMMA.16816"):
        return 16 * 16 * 8
    wide = re.match(r"HGMMA\.64x(\d+)x16", name)
    return 64 * 16 * int(wide[1]) // 4 if wide else 0


def weights_a_turn(loop: Loop, tile: Tile) -> float:
    """Weights that one thread consumes in a turn, from what is multiplied: the assembler may unroll the loop."""
    if tile.block_m in TURING_ROWS:  # a pair of weights takes one operation to unpack, and one for each row
        return 2 * loop.counts.get("HFMA2", 0) / (1 + tile.block_m)
    return loop.products / tile.block_m / 32


@dataclass(frozen=True)
class Compiled:
    """One launch compiled for one architecture."""

    registers: int  # per thread
    shared: int  # bytes per program
    spilled: int  # bytes per thread, stores and loads
    loop: Loop | None  # the longest loop; None if there is none or the kernel was not disassembled
    instructions: int | None
    schedule: tuple[Step, ...] = ()  # of the same loop


def compile_launch(launch: Launch, capability: int, disassemble: bool = True) -> Compiled:
    """Compile for `capability` (86 for sm_86) through Triton's own cache; RuntimeError if it cannot be compiled.

    disassemble: read the main loop too, which takes another 0.2 s.
    """
    names = launch.function.arg_names
    source = ASTSource(
        launch.function,
        dict(launch.signature),
        dict(launch.constants),
        {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", cubin)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if not found:
            raise RuntimeError(f"cuobjdump reports no registers: {usage[:200]!r}")
        registers, stack = int(found[1]), int(found[2])
        # spills go to the stack: without one there is no need to run the assembler again
        spilled = _spilled(kernel.asm["ptx"], Path(folder), capability) if stack else 0
        # without annotating jumps by the branch stack (-ndf), which takes a fifth of the time
        listing = _run("nvdisasm", "-c", "-ndf", "-hex", cubin) if disassemble else ""
    length, loop = read_loop(listing) if disassemble else (None, None)
    return Compiled(registers, kernel.metadata.shared, spilled, loop, length, tuple(read_steps(listing)))


def read_loop(listing: str) -> tuple[int, Loop | None]:
    """Instructions in an nvdisasm listing, and its longest loop, found by its backward branch."""
    names: list[str] = []
    labels: dict[str, int] = {}
    longest: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            if found[1] == "NOP":
                continue
            names.append(found[1])
            target = re.search(r"`\(\.(L_x_\d+)\)", found[2]) if found[1].startswith("BRA") else None
            if target and target[1] in labels:
                longest = max(longest, names[labels[target[1]] :], key=len)
    return len(names), Loop.of(longest) if longest else None


def _spilled(ptx: str, folder: Path, capability: int) -> int:
    """Bytes of spill stores and loads per thread, from `ptxas -v`."""
    path = folder / "kernel.ptx"
    path.write_text(ptx)
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target
    assembler = "ptxas-blackwell" if capability >= 100 else "ptxas"
    # as Triton calls it: other options would spill otherwise
    extra = [] if triton.__version__.startswith("3.6") else ["--regAllocOptLevel=2"]
    output = _run(assembler, "-v", "-lineinfo", *extra, f"--gpu-name={target[1]}", path, "-o", folder / "again")
    return sum(int(size) for size in re.findall(r"(\d+) bytes spill", output))


def _run(tool: str, *arguments: object) -> str:
    run = subprocess.run([str(TOOLS / tool), *map(str, arguments)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{tool} failed: {run.stderr[:500]}")
    return run.stdout + run.stderr
