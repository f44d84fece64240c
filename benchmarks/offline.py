"""Compile Triton kernels for an NVIDIA architecture on any machine, and read the machine code: no GPU, no driver.

A launch is recorded from the project's own launchers, called on tensors without memory (device "meta"), so that what is
compiled here is what a card would run: the same constants, types and alignments. The assembler and disassembler are
those that Triton brings along. TRITON_INTERPRET must not be set when the kernels are imported.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
}
CONVERSIONS = ("I2F", "I2FP", "I2HP")  # integer to float, on a pipe with a fraction of the others' rate
LOADS = ("LDG", "LDGSTS")  # from global memory


@dataclass(frozen=True)
class Launch:
    """What `triton.compile` needs to know of one launch; picklable, equal launches compile to the same code."""

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

    def constant(self, name: str) -> Any:
        """The value of a constexpr argument."""
        return dict(self.constants)[name]

    @property
    def num_warps(self) -> int:
        """Warps a program."""
        warps: int = dict(self.options)["num_warps"]
        return warps


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, kernels are not run: every launch is appended to the list that is given."""
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
    """As JITFunction.run specializes: None and 1 become constants, multiples of 16 are known as such."""
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
            signature.append((name, "*" + TYPES[value.dtype]))
            aligned.append(name)  # torch's allocator aligns to 512 bytes, and the views that are passed keep 16
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                aligned.append(name)
    where = f"{function.fn.__module__}:{function.fn.__name__}"
    return Launch(where, tuple(signature), tuple(constants), tuple(aligned), tuple(sorted(named.items())))


@dataclass(frozen=True)
class Loop:
    """One turn of a kernel's main loop, without NOPs."""

    length: int  # instructions
    counts: dict[str, int]  # by name without modifiers
    loads: dict[str, int]  # loads from global memory by name and bytes for one thread: "LDG 4", "LDGSTS 16", …
    products: int  # multiplications by tensor cores, for one warp

    @classmethod
    def of(cls, names: list[str]) -> "Loop":
        """Count the instructions of one turn, given with their modifiers."""
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


@dataclass(frozen=True)
class Compiled:
    """What the assembler made of one launch for one architecture."""

    registers: int  # a thread
    shared: int  # bytes a program
    spilled: int  # bytes a thread, stores and loads
    loop: Loop | None  # the longest loop, or None where there is none or it was not read
    instructions: int | None


def compile_launch(launch: Launch, capability: int, *, disassemble: bool = True) -> Compiled:
    """Compile for `capability` (86 for sm_86) through Triton's own cache; RuntimeError if it cannot be compiled.

    disassemble: read the main loop too, which takes the disassembler a fifth of a second.
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
            raise RuntimeError(f"cuobjdump says nothing of registers: {usage[:200]!r}")
        registers, stack = int(found[1]), int(found[2])
        # what is spilled lies on the stack; only where there is one does the assembler have to be asked again
        spilled = _spilled(kernel.asm["ptx"], Path(folder), capability) if stack else 0
        length, loop = read_loop(_run("nvdisasm", "-c", cubin)) if disassemble else (None, None)
    return Compiled(registers, kernel.metadata.shared, spilled, loop, length)


def read_loop(listing: str) -> tuple[int, Loop | None]:
    """How many instructions a nvdisasm listing has, and the loop with most of them: the longest backward branch."""
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
    """Bytes of spill stores and loads a thread, as the assembler's -v says."""
    path = folder / "kernel.ptx"
    path.write_text(ptx)
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target
    assembler = "ptxas-blackwell" if capability >= 100 else "ptxas"
    # as Triton calls it: other options would spill otherwise
    extra = [] if triton.__version__.startswith("3.6") else ["--regAllocOptLevel=2"]
    said = _run(assembler, "-v", "-lineinfo", *extra, f"--gpu-name={target[1]}", path, "-o", folder / "again")
    return sum(int(size) for size in re.findall(r"(\d+) bytes spill", said))


def _run(tool: str, *arguments: object) -> str:
    run = subprocess.run([str(TOOLS / tool), *map(str, arguments)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{tool} failed: {run.stderr[:500]}")
    return run.stdout + run.stderr
