"""What the GPU kernels compile to, on any machine: python -m benchmarks.compiled [--arch 86 …] [--quick] [--json FILE]

For every kernel and architecture, and for every entry of the tile tables: registers, spilled bytes, shared memory,
main-loop instructions per weight (or per element of keys and values), widths of its loads, and whether the stated
bounds hold. Exit code 1 if one does not. Times are measured by benchmarks.gpu, on a GPU.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import torch
import triton
from tqdm import tqdm

from benchmarks import report
from benchmarks.kernels.offline import (
    GPUS,
    SHARED,
    WEIGHT_LIMITS,
    Compiled,
    Launch,
    Loop,
    attention_launch,
    compile_launch,
    gemm_launch,
    meta,
    record_one,
    weights_a_turn,
)
from benchmarks.kernels.problem import C_ATTN, GEMMS, HEAD, LAYER, Gemm, weight_of
from kernels.gpu.gemm import rows_triton
from kernels.gpu.tiles import DECODE_ROWS, TURING_ROWS, Tile, read_table, tile_for
from kernels.gpu.turing import dequantize
from qvl_edge import markdown
from qvl_edge.machine import describe_machine

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 120)
QUICK = (75, 86, 89, 90, 120)  # 80 and 87 compile to what 86 does, with more shared memory
VARIANTS = (75, 86, 90)  # where --quick compiles all variants
BOUNDED = (75, 86, 87, 89, 90, 120)  # where the bounds on instructions are held
# instructions per element of keys and values, by the cache's dtype
CACHE_LIMITS = {torch.float16: 5.0, torch.bfloat16: 5.0, torch.int8: 6.0}


@dataclass(frozen=True)
class Case:
    """One compilation, and its bounds."""

    name: str
    launch: Launch
    kernel: str  # its row of the summary
    gemm: Gemm | None = None
    dtype: torch.dtype = torch.float16
    tile: Tile | None = None
    limit: float | None = None  # instructions per unit

    @property
    def decodes_attention(self) -> bool:
        """Its units are elements of keys and values."""
        return self.launch.kernel.endswith(":decode_kernel")

    def units(self, loop: Loop | None) -> float:
        """Weights, or elements of keys and values, that one thread consumes per iteration of the main loop.

        Counted from its tensor-core instructions (or 16-byte loads), because the assembler may unroll it.
        """
        if loop is None:
            return 0.0
        if self.tile is not None:
            return weights_a_turn(loop, self.tile)
        if self.decodes_attention:
            return loop.loaded(16) / (1 if dict(self.launch.signature)["k_cache_ptr"] == "*i8" else 2)
        return 0.0


def gemm_case(gemm: Gemm, tile: Tile, dtype: torch.dtype = torch.float16, *, one_row: bool = False) -> Case:
    """A GEMM; instructions are bounded for int4 as published, other variants are only reported."""
    bits, group = gemm.bits, gemm.group
    published = bits == 4 and group == 128 and not gemm.zeros and dtype == torch.float16
    variant = " with zeros" if gemm.zeros else ""
    if bits == 4 and group != 128:
        variant += " in one group" if group == gemm.k else f" in groups of {group}"
    variant += (" in bfloat16" if dtype == torch.bfloat16 else "") + (" of one row" if one_row else "")
    shape = f"{tile.block_m} x {tile.block_n}, {tile.num_warps} warps, {tile.num_stages} stages"
    name = f"{gemm.name}{variant}, {shape}" + (", split" if tile.split_k > 1 else "")
    launch = gemm_launch(gemm, tile, dtype, one_row=one_row)
    limit = WEIGHT_LIMITS.get(tile.block_m) if published else None
    return Case(name, launch, f"int{bits}{variant}, {tile.block_m} rows", gemm, dtype, tile, limit)


def gemm_cases(capability: int, quick: bool) -> Iterator[Case]:
    """The int4 and int8 kernels with the tiles of the architecture's first GPU, and their variants."""
    device = next(card for card in GPUS if card.capability == capability).key
    few = TURING_ROWS if device.turing else DECODE_ROWS
    for block_m in device.rows:
        for gemm in LAYER:
            yield gemm_case(gemm, tile_for(block_m, gemm.n, gemm.k, 128, device=device))
    for block_m in few:
        yield gemm_case(HEAD, tile_for(block_m, HEAD.n, HEAD.k, HEAD.k, bits=8, device=device))
    if quick and capability not in VARIANTS:
        return
    for gemm in LAYER:
        yield gemm_case(gemm, tile_for(1, gemm.n, gemm.k, 128, device=device), one_row=True)
    residual = (meta(8, 4096, dtype=torch.float32), meta(4096), 1e-6, torch.float16)
    for name, operands in (("sums of rows", (meta(8, 4096),)), ("rows of a residual", residual)):
        yield Case(name, record_one("_rows_kernel", rows_triton, *operands), name)
    if device.turing:
        weight = weight_of(C_ATTN, device="meta")
        yield Case("dequantize", record_one("dequantize_kernel", dequantize, weight), "dequantize")
    zeros = replace(C_ATTN, zeros=True)
    variants = (
        (C_ATTN, torch.bfloat16),
        (zeros, torch.float16),
        (zeros, torch.bfloat16),
        (replace(zeros, group=32), torch.float16),
        (replace(C_ATTN, group=64), torch.float16),
        (replace(C_ATTN, group=C_ATTN.k), torch.float16),
    )
    for block_m in TURING_ROWS if device.turing else (16, 128) if quick else (8, 16, 64, 128):
        for gemm, dtype in variants:
            if device.turing and dtype == torch.bfloat16:
                continue
            yield gemm_case(gemm, tile_for(block_m, gemm.n, gemm.k, gemm.group, device=device), dtype)


def attention_cases(capability: int, quick: bool) -> Iterator[Case]:
    """The attention kernels by cache dtype, with and without log-n scaling and splits, for several prompt lengths."""
    fewer = quick and capability not in VARIANTS
    for cache, limit in CACHE_LIMITS.items():
        if capability == 75 and cache == torch.bfloat16:
            continue
        kind = f"{str(cache).removeprefix('torch.')} cache"
        for splits in (8, 1):
            launch = attention_launch("decode_kernel", cache, 1, splits=splits, logn=splits > 1)
            kernel = f"attention, decode, {kind}"
            yield Case(kernel + (", 8 splits, log-n" if splits > 1 else ", 1 split"), launch, kernel, limit=limit)
            if quick:
                break
        if fewer:
            continue
        for length in () if capability == 75 else (512, 64, 16):
            kernel = f"attention, {length} tokens, {kind}"
            yield Case(kernel, attention_launch("prefill_kernel", cache, length), kernel)
            if quick and cache == torch.bfloat16:
                break
        kernel = f"attention, append, {kind}"
        yield Case(kernel, attention_launch("append_kernel", cache, 512), kernel)


def table_cases(capability: int) -> Iterator[Case]:
    """Every entry of the architecture's tile table."""
    for card in read_table(f"sm_{capability}"):
        for (_, n, k, group, bits), tile in card.entries.items():
            listed = Gemm(f"{k} x {n}", k, n, bits=bits, group=group)
            known = (p for p in GEMMS if (p.n, p.k, p.bits, p.group) == (n, k, bits, group))
            yield gemm_case(next(known, listed), tile)


def bounds(case: Case, compiled: Compiled, capability: int) -> dict[str, tuple[float, float]]:
    """Name -> (value, largest allowed)."""
    found: dict[str, tuple[float, float]] = {
        "spilled bytes": (compiled.spilled, 0),
        "shared bytes": (compiled.shared, SHARED[capability]),
    }
    loop = compiled.loop
    if loop is not None and (units := case.units(loop)):
        if case.limit is not None and capability in BOUNDED:
            found["instructions a unit"] = (round(loop.length / units, 2), case.limit)
        if case.gemm is not None:
            words = units * case.gemm.bits / 8  # bytes of weights
            # tiles of words and x go to shared memory, and then only scales, zeros and sums go to registers
            into = ("LDGSTS",) if any(name.startswith("LDGSTS") for name in loop.loads) else ("LDG",)
            found["conversions"] = (loop.conversions, 0)
            found["narrow bytes"] = (loop.loaded(4, into=into) + loop.loaded(8, into=into), words - 1)
            found["bytes not loaded 16 at a time"] = (words - loop.loaded(16), 0)
    return found


def collect(architectures: tuple[int, ...], quick: bool) -> list[tuple[int, Case]]:
    """(architecture, case) of every distinct launch."""
    found: dict[tuple[int, Launch], Case] = {}
    for capability in architectures:
        cases = list(table_cases(capability))
        if not quick or capability in QUICK:
            cases = [*gemm_cases(capability, quick), *attention_cases(capability, quick), *cases]
        for case in cases:
            found.setdefault((capability, case.launch), case)
    return [(capability, case) for (capability, _), case in found.items()]


def read_loops(jobs: list[tuple[int, Case]], quick: bool) -> list[bool]:
    """Which cases are disassembled: if `quick`, those with bounds, one of each main loop.

    Projections with the same tile differ in what comes before and after it.
    """
    found, seen = [], set[tuple[object, ...]]()
    for capability, case in jobs:
        loop = (capability, case.kernel, case.tile and replace(case.tile, split_k=1))
        found.append(not quick or (loop not in seen and bool(case.gemm or case.decodes_attention)))
        seen.add(loop)
    return found


def record(capability: int, case: Case, compiled: Compiled) -> dict[str, Any]:
    """One entry of --details."""
    units, limits = case.units(compiled.loop), bounds(case, compiled, capability)
    return {
        "architecture": f"sm_{capability}",
        "kernel": case.kernel,
        "case": case.name,
        "projection": asdict(case.gemm) | {"dtype": str(case.dtype)} if case.gemm else None,
        "tile": asdict(case.tile) if case.tile else None,
        **asdict(replace(compiled, schedule=())),
        "instructions_a_unit": round(compiled.loop.length / units, 2) if units and compiled.loop else None,
        "bounds": {name: {"value": value, "limit": limit} for name, (value, limit) in limits.items()},
        "holds": all(value <= limit for value, limit in limits.values()),
    }


def summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per kernel and architecture: the most registers and bytes, the range of instructions per unit."""
    key, lines = itemgetter("kernel", "architecture"), []
    for (kernel, architecture), group in groupby(sorted(records, key=key), key):
        entries = list(group)
        line = {"kernel": kernel, "architecture": architecture, "compilations": len(entries)}
        line |= {name: max(entry[name] for entry in entries) for name in ("registers", "spilled", "shared")}
        units = [entry["instructions_a_unit"] for entry in entries if entry["instructions_a_unit"]]
        lines.append(line | ({"instructions_a_unit": [min(units), max(units)]} if units else {}))
    return lines


def table(records: list[dict[str, Any]]) -> str:
    """Markdown, one row per compilation."""
    rows = []
    for entry in records:
        broken = [name for name, bound in entry["bounds"].items() if bound["value"] > bound["limit"]]
        cells = [entry[name] for name in ("architecture", "case", "registers", "spilled", "shared")]
        cells += [entry["loop"]["length"] if entry["loop"] else "", entry["instructions_a_unit"] or ""]
        cells.append(entry["bounds"].get("instructions a unit", {}).get("limit", ""))
        rows.append([*cells, "yes" if entry["holds"] else "NO: " + ", ".join(broken)])
    head = ["architecture", "kernel", "registers", "spilled", "shared", "loop", "per unit", "limit", "holds"]
    return markdown.table(head, rows)


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 1 if a bound does not hold."""
    parser = report.command("compiled", __doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument(
        "--quick", action="store_true", help=f"kernels on {QUICK} only, one main loop of each kind read"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel compilations (default: all cores)")
    parser.add_argument("--json", type=Path, help="save the summary, with versions, commit and date")
    parser.add_argument("--details", type=Path, help="save the counts and bounds of every compilation")
    args = parser.parse_args(arguments)
    jobs = collect(tuple(args.arch), args.quick)
    # forked after the imports: importing torch again takes as long as ten compilations
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        work = [(case.launch, arch) for arch, case in jobs]
        results = pool.map(compile_launch, *zip(*work, strict=True), read_loops(jobs, args.quick))
        results = tqdm(results, total=len(jobs), disable=None)
        records = [record(*job, compiled) for job, compiled in zip(jobs, results, strict=True)]
    print(table(records))
    broken = sum(not entry["holds"] for entry in records)
    entries = {f"sm_{arch}": sum(len(card.entries) for card in read_table(f"sm_{arch}")) for arch in args.arch}
    kernels_on = [arch for arch in args.arch if not args.quick or arch in QUICK]
    some = f" (all variants on {VARIANTS})" if args.quick else ""
    print(f"\nWith triton {triton.__version__}: all kernels on {kernels_on}{some}; tile table entries {entries};")
    print(f"{len(records)} distinct compilations. Instructions are bounded on {BOUNDED}.")
    print(f"{broken} exceed a bound." if broken else "All bounds hold.")
    if args.json:
        head = {"benchmark": "compiled", **describe_machine(), "triton": triton.__version__}
        lines = ",\n".join("  " + json.dumps(line) for line in summary(records))
        args.json.write_text(json.dumps(head, indent=1)[:-2] + f',\n "kernels": [\n{lines}\n ]\n}}\n')
    if args.details:
        args.details.write_text(json.dumps(records))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
