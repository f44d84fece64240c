"""Find the tiles of a GPU and write them into its family's table: python -m benchmarks.tune --device cuda [--write]

Candidates are pruned by shared memory, and each is checked against float64 before it is timed, in a CUDA graph over as
many weights as outgrow the caches. `--estimate` chooses for the cards of benchmarks/cards.py without any GPU, from what
the kernels compile to, and marks its entries as not measured; it leaves measured ones alone. Nothing of this is used
while a model runs.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from triton.errors import TritonError

from benchmarks.cards import CARDS, Card
from benchmarks.projections import PROJECTIONS, Problem, Projection
from benchmarks.timing import in_one_graph, measure_on_device
from kernels.gpu.tiles import (
    CHUNK,
    DECODE_ROWS,
    PREFILL_ROWS,
    TABLES,
    DeviceKey,
    Tile,
    device_key,
    parse_table,
    pipeline_bytes,
)
from kernels.gpu.weight import TILE
from qvl_edge.machine import describe_machine

if TYPE_CHECKING:
    from benchmarks.offline import Compiled

OUTGROWS_CACHES = 512 * 2**20  # bytes of weights in turn; the largest L2, an RTX PRO 6000's, holds 128 MiB
ROWS = {8: 1, 16: 16, 32: 32, 64: 64, 128: 512}  # rows at which the tiles of each block_m are compared
DECODE_SHAPES = ((128, 2), (64, 1), (128, 4), (64, 2))  # block_n, num_warps
PREFILL_SHAPES = ((128, 4), (128, 8), (64, 4))
DECODE_STAGES, PREFILL_STAGES = (4, 3, 5), (3, 2, 4)
SPLITS = (1, 2, 3, 4, 5, 6, 8, 11, 16, 22)

# what the estimate takes for granted; rough, and the reason why a measurement replaces it
LATENCY_US = 0.8  # of memory under load
EFFICIENCY = 0.92  # of the published bandwidth, as a copy reaches it
ISSUE_RATE = 3.2  # of a multiprocessor's four instructions a cycle
# multiply-adds a cycle and multiprocessor, from float16 into float32 (architecture whitepapers)
TENSOR_RATE = {80: 1024, 86: 256, 87: 1024, 89: 256, 90: 2048, 120: 256}


def splits_of(projection: Projection) -> list[int]:
    """Numbers of splits that leave each program four chunks and none of them empty."""
    chunks = -(-projection.k // CHUNK)
    return sorted({-(-chunks // -(-chunks // split)) for split in SPLITS if split == 1 or split * 4 <= chunks})


def candidates(projection: Projection, block_m: int, device: DeviceKey) -> list[Tile]:
    """Every tile worth trying, first those that are most likely good."""
    if block_m in DECODE_ROWS:
        tiles = [
            Tile(block_m, block_n, split, warps, stages)
            for stages in DECODE_STAGES
            for block_n, warps in DECODE_SHAPES
            for split in splits_of(projection)
        ]
    else:
        tiles = [
            Tile(block_m, block_n, 1, warps, stages)
            for stages in PREFILL_STAGES
            for block_n, warps in PREFILL_SHAPES
            # 128 x 128 sums take all registers of four warps, and spill where there is no wgmma
            if (block_m, block_n, warps) != (128, 128, 4) or device.capability[0] == 9
        ]
    return [t for t in tiles if shared_bytes(t, projection.bits) <= device.shared_memory]


def shared_bytes(tile: Tile, bits: int) -> int:
    """Shared memory that a tile takes at least: the last stage lives in registers."""
    return pipeline_bytes(tile.block_m, tile.block_n, tile.num_stages - 1, bits)


def search(tiles: Iterable[Tile], cost: Callable[[Tile], float]) -> tuple[Tile, float]:
    """The cheapest tile: all shapes and splits at the first number of stages, then all stages of the best of these.

    ValueError if every candidate costs infinitely much, which says that it cannot run.
    """
    known: dict[Tile, float] = {}

    def best_of(some: list[Tile]) -> Tile:
        for tile in some:
            if tile not in known:
                known[tile] = cost(tile)
        return min(some, key=known.__getitem__)

    tiles = list(tiles)
    if not tiles:
        raise ValueError("no tile fits into the shared memory of this device")
    first = best_of([tile for tile in tiles if tile.num_stages == tiles[0].num_stages])
    best = best_of([tile for tile in tiles if replace(tile, num_stages=first.num_stages) == first])
    if math.isinf(known[best]):
        raise ValueError(f"none of {len(known)} tiles runs on this device")
    return best, known[best]


def measure_tile(problems: list[Problem], tile: Tile, *, rounds: int) -> float:
    """Microseconds of one launch; infinite where it cannot run, SystemExit where it computes something else."""
    try:
        error = problems[0].error(tile)
    except (RuntimeError, TritonError):  # too much shared memory, or more than the assembler can do
        return math.inf
    if not error < problems[0].tolerance:
        name = problems[0].projection.name
        raise SystemExit(f"{name} with {tile} is off by {error:.1e}, allowed is {problems[0].tolerance:.1e}")
    calls = len(problems) * max(1, 32 // len(problems))
    replay = in_one_graph([partial(problem.run, tile) for problem in islice(cycle(problems), calls)])
    return 1000 * measure_on_device({"": replay}, rounds=rounds, seconds=1.0)[""].median_ms / calls


def tune(projection: Projection, block_m: int, *, rounds: int) -> tuple[Tile, float]:
    """The fastest tile on this machine's GPU, and its microseconds."""
    problem = Problem.random(projection, ROWS[block_m], device="cuda")
    count = -(-OUTGROWS_CACHES // problem.bytes_read)
    problems = [problem, *(problem.another_weight(seed) for seed in range(1, count))]
    tiles = candidates(projection, block_m, device_key(torch.device("cuda")))
    return search(tiles, lambda tile: measure_tile(problems, tile, rounds=rounds))


def estimate(card: Card, projection: Projection, tile: Tile, compiled: "Compiled") -> float:
    """Microseconds of one launch by arithmetic: the slowest of memory, instructions and tensor cores, and the start.

    Memory is used in full only if enough of it is on its way at any time, and if no multiprocessor has more to do than
    the others (half of what it has too much is taken to be made good by the bandwidth that the others leave it, unless
    some have nothing).
    """
    if compiled.spilled or compiled.loop is None:
        return math.inf
    resident = card.resident(compiled.registers, compiled.shared, tile.num_warps)
    if not resident:
        return math.inf
    rows = ROWS[tile.block_m]
    chunks, tiles = -(-projection.k // CHUNK), -(-projection.n // tile.block_n)
    programs = tiles * tile.split_k * -(-rows // tile.block_m)
    share = -(-chunks // tile.split_k)
    fullest = -(-programs // card.multiprocessors)  # programs of the multiprocessor with most of them
    active = min(resident, fullest)
    step_bytes = tile.block_n * (CHUNK * projection.bits // 8 + 2)
    memory = tiles * chunks * step_bytes / (card.gb_per_s * EFFICIENCY * 1e3)
    on_its_way = min(programs, resident * card.multiprocessors) * (tile.num_stages - 1) * step_bytes
    memory *= max(1.0, card.gb_per_s * 1e3 * LATENCY_US / on_its_way)
    balance = fullest * share * card.multiprocessors / (programs * share)
    cycles_per_us = card.ghz * 1e3
    issue = fullest * share * compiled.loop.length * tile.num_warps / ISSUE_RATE / cycles_per_us
    tensor = fullest * share * tile.block_m * tile.block_n * CHUNK / TENSOR_RATE[card.capability] / cycles_per_us
    waves = -(-programs // (card.multiprocessors * resident))
    start = LATENCY_US * (waves + 1)
    if tile.split_k > 1:
        start += LATENCY_US * 2 + tile.split_k * tile.block_m * tile.block_n * 4 / 50e3  # 50 GB/s for one program
    if tile.block_m in PREFILL_ROWS:
        # what one program waits for, others have to fill
        return max(memory, (issue + tensor) / min(active, 2) if active > 1 else issue + tensor, issue, tensor) + start
    waste = balance if fullest == 1 else (1 + balance) / 2
    return max(memory * waste, issue, tensor) + start


def _compile(job: tuple[Any, int]) -> "Compiled":
    from benchmarks.offline import compile_launch

    return compile_launch(*job)


def estimate_all(cards: Iterable[Card], projections: Iterable[Projection]) -> dict[Card, list[dict[str, Any]]]:
    """Entries for each card, from one compilation of each shape for its architecture."""
    from benchmarks import launches

    projection_launch = cache(launches.projection_launch)
    cards, projections = list(cards), list(projections)
    kinds = [(p, m) for p in projections for m in (*DECODE_ROWS, *PREFILL_ROWS) if p.bits == 4 or m in DECODE_ROWS]
    jobs: dict[tuple[int, Any], tuple[Any, int]] = {}
    for capability in sorted({card.capability for card in cards}):
        device = next(card.key for card in cards if card.capability == capability)
        for projection, block_m in kinds:
            for tile in candidates(projection, block_m, device):
                if tile.num_stages == 3:  # others differ in shared memory only
                    launch = projection_launch(projection, tile)
                    jobs.setdefault((capability, launch), (launch, capability))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("fork")) as pool:
        results = dict(zip(jobs, pool.map(_compile, jobs.values()), strict=True))
    entries: dict[Card, list[dict[str, Any]]] = {}
    for card in cards:
        entries[card] = []
        for projection, block_m in kinds:

            def cost(tile: Tile, card: Card = card, projection: Projection = projection) -> float:
                compiled = results[card.capability, projection_launch(projection, replace(tile, num_stages=3))]
                more = shared_bytes(tile, projection.bits) - shared_bytes(replace(tile, num_stages=3), projection.bits)
                us = estimate(card, projection, tile, replace(compiled, shared=compiled.shared + more))
                # in steps of 5 %: finer than that it knows nothing, and the first of equal candidates is taken
                return 1.05 ** round(math.log(us, 1.05)) if math.isfinite(us) else us

            tile, _ = search(candidates(projection, block_m, card.key), cost)
            entries[card].append(entry_of(projection, tile))
    return entries


def entry_of(projection: Projection, tile: Tile) -> dict[str, Any]:
    """One entry of a table."""
    return {"n": projection.n, "k": projection.k, "group": projection.group, "bits": projection.bits, **asdict(tile)}


def write_card(path: Path, card: dict[str, Any]) -> None:
    """Put a card's entries into a table, in place of those that it had for the same shapes; at once or not at all."""
    cards = json.loads(path.read_text())["cards"] if path.exists() else []
    old = next((c for c in cards if c["device"] == card["device"]), None)
    if old is not None and old["measured"] == card["measured"]:
        keys = ("block_m", "n", "k", "group", "bits")
        listed = {tuple(entry[key] for key in keys) for entry in card["entries"]}
        kept = [entry for entry in old["entries"] if tuple(entry[key] for key in keys) not in listed]
        card = card | {"entries": kept + card["entries"]}
    cards = [c for c in cards if c is not old] + [card]
    cards.sort(key=lambda c: c["multiprocessors"])
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(_readable(cards))
    parse_table(beside)
    beside.replace(path)


def _readable(cards: list[dict[str, Any]]) -> str:
    """JSON with one line an entry."""
    parts = []
    for card in cards:
        head = json.dumps({key: value for key, value in card.items() if key != "entries"}, indent=2)
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in card["entries"])
        parts.append(head.removesuffix("\n}") + f',\n  "entries": [\n{lines}\n  ]\n}}')
    return '{"cards": [\n' + ",\n".join(parts) + "\n]}\n"


def main(arguments: list[str] | None = None) -> None:
    """Parse, search, print, write."""
    names = {projection.name: projection for projection in PROJECTIONS}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--device", choices=("cuda",), help="measure on this machine's GPU")
    how.add_argument("--estimate", action="store_true", help="choose for all known cards, without a GPU")
    parser.add_argument("--shape", nargs="+", choices=names, default=list(names), help="projections (default: all)")
    parser.add_argument("--block-m", type=int, nargs="+", choices=ROWS, default=list(ROWS), help="rows of one program")
    parser.add_argument("--rounds", type=int, default=50, help="graphs of each candidate (default: 50)")
    parser.add_argument("--write", action="store_true", help="write into kernels/gpu/tiles; without it, only print")
    parser.add_argument("--folder", type=Path, default=TABLES, help="where the tables are (default: kernels/gpu/tiles)")
    args = parser.parse_args(arguments)
    chosen = [names[name] for name in args.shape]
    if args.estimate:
        os.environ.pop("TRITON_INTERPRET", None)
        machine = describe_machine()
        for card, entries in estimate_all(CARDS, chosen).items():
            made = {"device": card.name, "multiprocessors": card.multiprocessors, "measured": False}
            path = args.folder / f"{card.key.family}.json"
            measured = path.exists() and any(
                c["measured"] and c["device"] == card.name for c in json.loads(path.read_text())["cards"]
            )
            print(f"{card.name}: {len(entries)} entries" + (", left as measured" if measured else ""), file=sys.stderr)
            if args.write and not measured:
                write_card(path, made | _made_by(machine) | {"entries": entries})
        return
    if not torch.cuda.is_available():
        parser.error("no CUDA device is here; --estimate needs none")
    machine, key = describe_machine("cuda"), device_key(torch.device("cuda"))
    made = {"device": machine["device"], "multiprocessors": key.multiprocessors, "measured": True}
    with torch.inference_mode():
        for projection in chosen:
            for block_m in args.block_m if projection.bits == 4 else [m for m in args.block_m if m in DECODE_ROWS]:
                tile, us = tune(projection, block_m, rounds=args.rounds)
                rate = projection.n * projection.k * projection.bits / 8 / us / 1e3
                print(f"{projection.name}, {ROWS[block_m]} rows: {us:.1f} us, {rate:.0f} GB/s, {tile}", flush=True)
                if args.write:  # one by one, so that a stopped run leaves what it has found
                    entry = {"entries": [entry_of(projection, tile)]}
                    write_card(args.folder / f"{key.family}.json", made | _made_by(machine) | entry)


def _made_by(machine: dict[str, Any]) -> dict[str, Any]:
    return {"versions": machine["versions"], "commit": machine["commit"], "date": machine["date"]}


if __name__ == "__main__":
    assert TILE == 128, "block_n of the candidates divides what a weight is padded to"
    main()
