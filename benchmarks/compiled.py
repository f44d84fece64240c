"""What the GPU kernels compile to, on any machine: python -m benchmarks.compiled [--arch 86 …] [--quick] [--json FILE]

For every kernel and architecture, and for every entry of the tile tables: registers, spilled bytes, shared memory,
instructions a weight (or an element of keys and values) in the main loop, widths of its loads; and whether the stated
bounds hold. Exit code 1 if one does not. It says nothing about time: benchmarks.gpu does, on a card.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # whatever the parent has: interpreted kernels cannot be compiled

import torch
import triton

from benchmarks.kernels.offline import (
    GPUS,
    SHARED,
    Compiled,
    Launch,
    Loop,
    attention_launch,
    compile_launch,
    gemm_launch,
    meta,
    record_one,
)
from benchmarks.kernels.problem import C_ATTN, GEMMS, HEAD, LAYER, Gemm
from kernels.gpu.gemm import rows_triton
from kernels.gpu.tiles import DECODE_ROWS, PREFILL_ROWS, Tile, read_table, tile_for
from qvl_edge.machine import describe_machine

ARCHITECTURES = (80, 86, 87, 89, 90, 120)
QUICK = (86, 89, 90, 120)  # 80 and 87 compile to what 86 does, with more shared memory
VARIANTS = (86, 90)  # where --quick compiles all variants
BOUNDED = (86, 87, 89, 90, 120)  # where the bounds on instructions are held
# instructions a weight of the published kind (float16, groups of 128, symmetric) at 8 and 16 rows
WEIGHT_LIMITS = {8: 2.5, 16: 3.0}
# instructions an element of keys and values, by the cache's type
CACHE_LIMITS = {torch.float16: 5.0, torch.bfloat16: 5.0, torch.int8: 6.0}


@dataclass(frozen=True)
class Case:
    """One compilation, and what bounds it."""

    name: str
    launch: Launch
    kernel: str  # what the summary counts it under
    gemm: Gemm | None = None
    dtype: torch.dtype = torch.float16
    tile: Tile | None = None
    limit: float | None = None  # of instructions a unit

    @property
    def decodes_attention(self) -> bool:
        """Its units are elements of keys and values."""
        return self.launch.kernel.endswith(":decode_kernel")

    @property
    def is_bounded(self) -> bool:
        """Its main loop is."""
        return self.gemm is not None or self.decodes_attention


def gemm_case(gemm: Gemm, tile: Tile, dtype: torch.dtype = torch.float16, *, one_row: bool = False) -> Case:
    """A GEMM with what bounds it: int4 as published is, its variants are only reported."""
    bits, group = gemm.bits, gemm.group
    published = bits == 4 and group == 128 and not gemm.zeros and dtype == torch.float16
    variant = " with zeros" if gemm.zeros else ""
    if bits == 4 and group != 128:
        variant += " in one group" if group == gemm.k else f" in groups of {group}"
    variant += (" in bfloat16" if dtype == torch.bfloat16 else "") + (" of one row" if one_row else "")
    shape = f"{tile.block_m} x {tile.block_n}, {tile.num_warps} warps, {tile.num_stages} stages"
    return Case(
        f"{gemm.name}{variant}, {shape}" + (", split" if tile.split_k > 1 else ""),
        gemm_launch(gemm, tile, dtype, one_row=one_row),
        f"int{bits}{variant}, {tile.block_m} rows",
        gemm,
        dtype,
        tile,
        WEIGHT_LIMITS.get(tile.block_m) if published else None,
    )


def gemm_cases(capability: int, quick: bool) -> Iterator[Case]:
    """The int4 and int8 kernels with the tiles of the architecture's first card, and their variants."""
    device = next(card for card in GPUS if card.capability == capability).key
    for block_m in (*DECODE_ROWS, *PREFILL_ROWS):
        for gemm in LAYER:
            yield gemm_case(gemm, tile_for(block_m, gemm.n, gemm.k, 128, device=device))
    for gemm in LAYER:
        tile = tile_for(1, gemm.n, gemm.k, 128, device=device)
        yield gemm_case(gemm, tile, one_row=True)
    for block_m in DECODE_ROWS:
        yield gemm_case(HEAD, tile_for(block_m, HEAD.n, HEAD.k, HEAD.k, bits=8, device=device))
    if quick and capability not in VARIANTS:
        return
    x, residual = meta(8, 4096), meta(8, 4096, dtype=torch.float32)
    sums = record_one("_rows_kernel", rows_triton, x)
    yield Case("sums of rows", sums, "sums of rows")
    rms = record_one("_rows_kernel", rows_triton, residual, meta(4096), 1e-6, torch.float16)
    yield Case("rows of a residual", rms, "rows of a residual")
    zeros = replace(C_ATTN, zeros=True)
    variants = (
        (C_ATTN, torch.bfloat16),
        (zeros, torch.float16),
        (zeros, torch.bfloat16),
        (replace(zeros, group=32), torch.float16),
        (replace(C_ATTN, group=64), torch.float16),
        (replace(C_ATTN, group=C_ATTN.k), torch.float16),
    )
    for block_m in (16, 128) if quick else (8, 16, 64, 128):
        for gemm, dtype in variants:
            tile = tile_for(block_m, gemm.n, gemm.k, gemm.group, device=device)
            yield gemm_case(gemm, tile, dtype)


def attention_cases(capability: int, quick: bool) -> Iterator[Case]:
    """The attention kernels: cache types, log-n scaling or not, one split or several, prompts of several lengths."""
    fewer = quick and capability not in VARIANTS
    for cache, limit in CACHE_LIMITS.items():
        kind = f"{str(cache).removeprefix('torch.')} cache"
        for splits in (8, 1):
            launch = attention_launch("decode_kernel", cache, 1, splits=splits, logn=splits > 1)
            kernel = f"attention, decode, {kind}"
            yield Case(kernel + (", 8 splits, log-n" if splits > 1 else ", 1 split"), launch, kernel, limit=limit)
            if quick:
                break
        for length in (512, 64, 16):
            kernel = f"attention, {length} tokens, {kind}"
            yield Case(kernel, attention_launch("prefill_kernel", cache, length), kernel)
            if fewer or (quick and cache == torch.bfloat16):
                break
        if fewer:
            continue
        kernel = f"attention, append, {kind}"
        yield Case(kernel, attention_launch("append_kernel", cache, 512), kernel)


def table_cases(capability: int) -> Iterator[Case]:
    """Every entry of the architecture's tile table."""
    for card in read_table(f"sm_{capability}"):
        for (_, n, k, group, bits), tile in card.entries.items():
            listed = Gemm(f"{k} x {n}", k, n, bits=bits, group=group)
            known = (p for p in GEMMS if (p.n, p.k, p.bits, p.group) == (n, k, bits, group))
            yield gemm_case(next(known, listed), tile)


def units_a_turn(case: Case, compiled: Compiled) -> float:
    """Weights, or elements of keys and values, that one thread consumes in one turn of the main loop.

    From the tensor-core instructions (or the 16-byte loads) of the loop itself, as the assembler may unroll it.
    """
    if compiled.loop is None:
        return 0.0
    if case.tile is not None:
        return compiled.loop.products / case.tile.block_m / 32
    if case.decodes_attention:
        itemsize = 1 if dict(case.launch.signature)["k_cache_ptr"] == "*i8" else 2
        return compiled.loop.loaded(16) / itemsize
    return 0.0


def weight_bytes(case: Case, units: float) -> float:
    """Bytes of `units` weights."""
    return units * case.gemm.bits / 8 if case.gemm else 0.0


def narrow_bytes(loop: Loop) -> int:
    """Bytes of the loop's large tiles, words and x, that are loaded less than 16 at a time.

    These are all of them if the words are: so many bytes and more as the weights have. Tiles go to shared memory; what
    is loaded into registers are scales, zeros and sums, unless nothing goes to shared memory.
    """
    into = ("LDGSTS",) if any(name.startswith("LDGSTS") for name in loop.loads) else ("LDG",)
    return loop.loaded(4, into=into) + loop.loaded(8, into=into)


def bounds(case: Case, compiled: Compiled, capability: int) -> dict[str, tuple[float, float]]:
    """Name -> (value, largest allowed) of everything that is bounded for this case."""
    found: dict[str, tuple[float, float]] = {
        "spilled bytes": (compiled.spilled, 0),
        "shared bytes": (compiled.shared, SHARED[capability]),
    }
    units, loop = units_a_turn(case, compiled), compiled.loop
    if units and loop:
        if case.limit is not None and capability in BOUNDED:
            found["instructions a unit"] = (round(loop.length / units, 2), case.limit)
        if case.tile is not None:
            found["conversions"] = (loop.conversions, 0)
            found["narrow bytes"] = (narrow_bytes(loop), weight_bytes(case, units) - 1)
            found["bytes not loaded 16 at a time"] = (weight_bytes(case, units) - loop.loaded(16), 0)
    return found


def _compile(job: tuple[Launch, int, bool]) -> Compiled:
    launch, capability, disassemble = job
    return compile_launch(launch, capability, disassemble=disassemble)


def collect(architectures: tuple[int, ...], quick: bool) -> list[tuple[int, Case]]:
    """What to compile: (architecture, case), equal launches of one architecture once."""
    found: dict[tuple[int, Launch], Case] = {}
    for capability in architectures:
        cases = list(table_cases(capability))
        if not quick or capability in QUICK:
            cases = [*gemm_cases(capability, quick), *attention_cases(capability, quick), *cases]
        for case in cases:
            found.setdefault((capability, case.launch), case)
    return [(capability, case) for (capability, _), case in found.items()]


def record(capability: int, case: Case, compiled: Compiled) -> dict[str, Any]:
    """Everything that is known of one compilation."""
    units = units_a_turn(case, compiled)
    limits, gemm = bounds(case, compiled, capability), case.gemm
    return {
        "architecture": f"sm_{capability}",
        "kernel": case.kernel,
        "case": case.name,
        "projection": asdict(gemm) | {"dtype": str(case.dtype)} if gemm else None,
        "tile": asdict(case.tile) if case.tile else None,
        **asdict(compiled),
        "instructions_a_unit": round(compiled.loop.length / units, 2) if units and compiled.loop else None,
        "bounds": {name: {"value": value, "limit": limit} for name, (value, limit) in limits.items()},
        "holds": all(value <= limit for value, limit in limits.values()),
    }


def summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each kernel and architecture: most registers, bytes; range of instructions a unit."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in records:
        found.setdefault((entry["kernel"], entry["architecture"]), []).append(entry)
    lines = []
    for (kernel, architecture), entries in sorted(found.items()):
        line = {"kernel": kernel, "architecture": architecture, "compilations": len(entries)}
        line |= {name: max(entry[name] for entry in entries) for name in ("registers", "spilled", "shared")}
        units = [entry["instructions_a_unit"] for entry in entries if entry["instructions_a_unit"]]
        lines.append(line | ({"instructions_a_unit": [min(units), max(units)]} if units else {}))
    return lines


def table(records: list[dict[str, Any]]) -> str:
    """Markdown, one row a compilation."""
    lines = [
        "| architecture | kernel | registers | spilled | shared | loop | a unit | limit | holds |",
        "| --- " * 9 + "|",
    ]
    for entry in records:
        limit = entry["bounds"].get("instructions a unit", {}).get("limit", "")
        broken = [name for name, bound in entry["bounds"].items() if bound["value"] > bound["limit"]]
        cells = (
            entry["architecture"],
            entry["case"],
            entry["registers"],
            entry["spilled"],
            entry["shared"],
            entry["loop"]["length"] if entry["loop"] else "",
            entry["instructions_a_unit"] or "",
            limit,
            "yes" if entry["holds"] else "NO: " + ", ".join(broken),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Parse, compile, print, save; 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument(
        "--quick", action="store_true", help=f"kernels on {QUICK} only; table entries on their own all the same"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time (default: all cores)")
    parser.add_argument("--json", type=Path, help="save the summary, with versions, commit and date")
    parser.add_argument("--details", type=Path, help="save everything that is known of each compilation")
    args = parser.parse_args(arguments)
    jobs = collect(tuple(args.arch), args.quick)
    records = []
    # forked after the imports: to import torch again would take as long as ten compilations
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        # what has no bounds in its loop is not disassembled when time counts
        work = [(case.launch, arch, not args.quick or case.is_bounded) for arch, case in jobs]
        for (capability, case), compiled in zip(jobs, pool.map(_compile, work), strict=True):
            records.append(record(capability, case, compiled))
            if sys.stderr.isatty():
                print(f"\r{len(records)} of {len(jobs)} ", end="", file=sys.stderr, flush=True)
    print(table(records))
    broken = sum(not entry["holds"] for entry in records)
    entries = {f"sm_{arch}": sum(len(card.entries) for card in read_table(f"sm_{arch}")) for arch in args.arch}
    kernels_on = [arch for arch in args.arch if not args.quick or arch in QUICK]
    some = f" (all variants on {VARIANTS})" if args.quick else ""
    print(
        f"\nCovered with triton {triton.__version__}: all kernels on {kernels_on}{some}; tile table entries {entries};"
    )
    print(f"{len(records)} different compilations. Bounds on instructions are held on {BOUNDED}.")
    print(f"{broken} break a bound." if broken else "All bounds hold.")
    if args.json:
        head = {"benchmark": "compiled", **describe_machine(), "triton": triton.__version__}
        lines = ",\n".join("  " + json.dumps(line) for line in summary(records))
        args.json.write_text(json.dumps(head, indent=1)[:-2] + f',\n "kernels": [\n{lines}\n ]\n}}\n')
    if args.details:
        args.details.write_text(json.dumps(records))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
