"""Find the tiles of a GPU and write them into its family's table: python -m benchmarks.tune --device cuda [--write]

Candidates are pruned by shared memory; each is checked against float64, then timed in a CUDA graph over enough weights
to exceed the caches. `--estimate` needs no GPU: for those listed in benchmarks/kernels/offline.py it chooses from the
compiled kernels and marks the entries as not measured; measured ones stay. The runtime only reads the tables.
"""

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from benchmarks.kernels.model import EFFICIENCY, Work, launch_us
from benchmarks.kernels.offline import (
    GPUS,
    WEIGHT_LIMITS,
    Compiled,
    Gpu,
    Launch,
    compile_launch,
    gemm_launch,
    weights_a_turn,
)
from benchmarks.kernels.problem import GEMMS, Gemm, Problem
from benchmarks.kernels.timing import measure
from benchmarks.report import command, say
from kernels.gpu.tiles import (
    CHUNK,
    DECODE_ROWS,
    PREFILL_ROWS,
    TABLES,
    TURING_ROWS,
    DeviceKey,
    Tile,
    device_key,
    parse_table,
    pipeline_bytes,
)
from kernels.gpu.weight import TILE
from qvl_edge.files import read_json, replacing
from qvl_edge.machine import describe_machine

ROWS = {
    1: 1,
    2: 2,
    4: 4,
    8: 1,
    16: 16,
    32: 32,
    64: 64,
    128: 512,
}  # rows at which the tiles of each block_m are compared
DECODE_SHAPES = ((128, 2), (64, 1), (128, 4), (64, 2))  # block_n, num_warps
TURING_SHAPES = ((64, 2), (128, 4), (64, 4), (128, 8))
PREFILL_SHAPES = ((128, 4), (128, 8), (64, 4))
DECODE_STAGES, PREFILL_STAGES = (4, 3, 5), (3, 2, 4)
SPLITS = (1, 2, 3, 4, 5, 6, 8, 11, 16, 22)

# assumptions of the estimate of a prefill; rough, which is why a measurement replaces it
LATENCY_US = 0.8  # of memory under load
ISSUE_RATE = 3.2  # of a multiprocessor's four instructions a cycle
# multiply-adds a cycle and multiprocessor, from float16 into float32 (architecture whitepapers)
TENSOR_RATE = {80: 1024, 86: 256, 87: 1024, 89: 256, 90: 2048, 120: 256}


def splits_of(gemm: Gemm) -> list[int]:
    """Numbers of splits that leave each program four chunks and none of them empty."""
    chunks = -(-gemm.k // CHUNK)
    return sorted({-(-chunks // -(-chunks // split)) for split in SPLITS if split == 1 or split * 4 <= chunks})


def candidates(gemm: Gemm, block_m: int, device: DeviceKey) -> list[Tile]:
    """Every tile worth trying, the most promising first."""
    if block_m in TURING_ROWS:  # without asynchronous copies there are no stages
        tiles = [Tile(block_m, *shape[:1], split, shape[1], 1) for shape in TURING_SHAPES for split in splits_of(gemm)]
    elif block_m in DECODE_ROWS:
        tiles = [
            Tile(block_m, block_n, split, warps, stages)
            for stages in DECODE_STAGES
            for block_n, warps in DECODE_SHAPES
            for split in splits_of(gemm)
        ]
    else:
        tiles = [
            Tile(block_m, block_n, 1, warps, stages)
            for stages in PREFILL_STAGES
            for block_n, warps in PREFILL_SHAPES
            # 128 x 128 sums take all registers of four warps, and spill where there is no wgmma
            if (block_m, block_n, warps) != (128, 128, 4) or device.capability[0] == 9
        ]
    return [t for t in tiles if shared_bytes(t, gemm.bits) <= device.shared_memory]


def shared_bytes(tile: Tile, bits: int) -> int:
    """Shared memory that a tile takes at least: the last stage lives in registers."""
    return pipeline_bytes(tile.block_m, tile.block_n, tile.num_stages - 1, bits)


def search(tiles: Iterable[Tile], cost: Callable[[Tile], float]) -> tuple[Tile, float]:
    """The cheapest tile: all shapes and splits at the first number of stages, then all stages of the best of these.

    An infinite cost means that a tile cannot run. ValueError if none can.
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
    """Microseconds of one launch; infinite if it cannot run, SystemExit if its result is wrong."""
    try:
        problems[0].checked(tile)
    except (RuntimeError, TritonError):  # too much shared memory, or more than the assembler can do
        return math.inf
    calls = len(problems) * max(1, 32 // len(problems))
    runs = [partial(problem.run, tile) for problem in islice(cycle(problems), calls)]
    return measure({"": runs}, device="cuda", rounds=rounds, seconds=1.0)[""].us()["us"]


def tune(gemm: Gemm, block_m: int, *, rounds: int) -> tuple[Tile, float]:
    """The fastest tile on this machine's GPU, and its microseconds."""
    problems = Problem.random(gemm, ROWS[block_m], device="cuda").copies()
    tiles = candidates(gemm, block_m, device_key(torch.device("cuda")))
    return search(tiles, lambda tile: measure_tile(problems, tile, rounds=rounds))


def estimate(gpu: Gpu, gemm: Gemm, tile: Tile, compiled: Compiled) -> float:
    """Estimated microseconds of one launch: of the decode kernels by kernels/model.py, of a prefill the slowest of
    memory, instructions and tensor cores, plus start-up.
    """
    if compiled.spilled or compiled.loop is None:
        return math.inf
    if tile.block_m not in PREFILL_ROWS:
        published = gemm.bits == 4 and gemm.group == CHUNK and not gemm.zeros
        most = WEIGHT_LIMITS[tile.block_m] if published else math.inf
        if compiled.loop.length / weights_a_turn(compiled.loop, tile) > most:
            return math.inf  # not what the kernels promise (benchmarks.compiled)
        stages = 2 if tile.block_m in TURING_ROWS else tile.num_stages
        return launch_us(gpu, Work.of_gemm(gemm, tile), compiled, num_warps=tile.num_warps, stages=stages)
    resident = gpu.resident(compiled.registers, compiled.shared, tile.num_warps)
    if not resident:
        return math.inf
    rows = ROWS[tile.block_m]
    chunks, tiles = -(-gemm.k // CHUNK), -(-gemm.n // tile.block_n)
    programs = tiles * tile.split_k * -(-rows // tile.block_m)
    share = -(-chunks // tile.split_k)
    fullest = -(-programs // gpu.multiprocessors)  # programs of the most loaded multiprocessor
    active = min(resident, fullest)
    step_bytes = tile.block_n * (CHUNK * gemm.bits // 8 + 2)
    memory = tiles * chunks * step_bytes / (gpu.gb_per_s * EFFICIENCY * 1e3)
    in_flight = min(programs, resident * gpu.multiprocessors) * (tile.num_stages - 1) * step_bytes
    memory *= max(1.0, gpu.gb_per_s * 1e3 * LATENCY_US / in_flight)
    cycles_per_us = gpu.ghz * 1e3
    issue = fullest * share * compiled.loop.length * tile.num_warps / ISSUE_RATE / cycles_per_us
    tensor = fullest * share * tile.block_m * tile.block_n * CHUNK / TENSOR_RATE[gpu.capability] / cycles_per_us
    waves = -(-programs // (gpu.multiprocessors * resident))
    start = LATENCY_US * (waves + 1)
    # other programs fill the time that one waits
    return max(memory, (issue + tensor) / min(active, 2) if active > 1 else issue + tensor, issue, tensor) + start


def estimate_all(gpus: Sequence[Gpu], gemms: Sequence[Gemm]) -> dict[Gpu, list[dict[str, Any]]]:
    """Entries for each GPU, from one compilation of each shape for its architecture."""
    launch_of = cache(gemm_launch)

    def kinds(device: DeviceKey) -> list[tuple[Gemm, int]]:
        return [(gemm, m) for gemm in gemms for m in device.rows if gemm.bits == 4 or m not in PREFILL_ROWS]

    jobs: dict[tuple[Launch, int], None] = {
        (launch_of(gemm, tile), capability): None
        for capability, device in {gpu.capability: gpu.key for gpu in gpus}.items()
        for gemm, block_m in kinds(device)
        for tile in candidates(gemm, block_m, device)
        if tile.num_stages in (1, 3)  # others differ in shared memory only
    }
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("fork")) as pool:
        results = dict(zip(jobs, pool.map(compile_launch, *zip(*jobs, strict=True)), strict=True))
    entries: dict[Gpu, list[dict[str, Any]]] = {gpu: [] for gpu in gpus}
    for gpu in gpus:
        for gemm, block_m in kinds(gpu.key):

            def cost(tile: Tile, gpu: Gpu = gpu, gemm: Gemm = gemm) -> float:
                three = replace(tile, num_stages=min(3, tile.num_stages) if gpu.key.turing else 3)
                compiled = results[launch_of(gemm, three), gpu.capability]
                more = shared_bytes(tile, gemm.bits) - shared_bytes(three, gemm.bits)
                us = estimate(gpu, gemm, tile, replace(compiled, shared=compiled.shared + more))
                # in steps of 2 %; of equal candidates the first is taken
                return 1.02 ** round(math.log(us, 1.02)) if math.isfinite(us) else us

            # all of them: fewer stages leave room for more programs, which the search for measuring would not see
            entries[gpu].append(entry_of(gemm, min(candidates(gemm, block_m, gpu.key), key=cost)))
    return entries


def entry_of(gemm: Gemm, tile: Tile) -> dict[str, Any]:
    """One entry of a table."""
    return {"n": gemm.n, "k": gemm.k, "group": gemm.group, "bits": gemm.bits, **asdict(tile)}


def write_card(path: Path, card: dict[str, Any]) -> None:
    """Merge a GPU's entries into a table, replacing its entries of the same shapes; atomic."""
    cards = read_json(path)["cards"] if path.exists() else []
    old = next((c for c in cards if c["device"] == card["device"]), None)
    if old is not None and old["measured"] == card["measured"]:
        keys = ("block_m", "n", "k", "group", "bits")
        listed = {tuple(entry[key] for key in keys) for entry in card["entries"]}
        kept = [entry for entry in old["entries"] if tuple(entry[key] for key in keys) not in listed]
        card = card | {"entries": kept + card["entries"]}
    cards = sorted([*(c for c in cards if c is not old), card], key=lambda c: c["multiprocessors"])
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(_readable(cards))
        parse_table(partial)


def _readable(cards: list[dict[str, Any]]) -> str:
    """JSON with one line per entry."""
    parts = []
    for card in cards:
        head = json.dumps({key: value for key, value in card.items() if key != "entries"}, indent=2)
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in card["entries"])
        parts.append(head.removesuffix("\n}") + f',\n  "entries": [\n{lines}\n  ]\n}}')
    return '{"cards": [\n' + ",\n".join(parts) + "\n]}\n"


def main(arguments: list[str] | None = None) -> None:
    names = {gemm.name: gemm for gemm in GEMMS}
    parser = command("tune", __doc__)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--device", choices=("cuda",), help="measure on this machine's GPU")
    how.add_argument("--estimate", action="store_true", help="choose for all known GPUs, without one")
    parser.add_argument("--shape", nargs="+", choices=names, default=list(names), help="projections (default: all)")
    parser.add_argument("--block-m", type=int, nargs="+", choices=ROWS, default=list(ROWS), help="rows per program")
    parser.add_argument("--rounds", type=int, default=50, help="timed graph replays per candidate (default: 50)")
    parser.add_argument("--write", action="store_true", help="write into the tables; without it, only print")
    parser.add_argument("--folder", type=Path, default=TABLES, help="of the tables (default: kernels/gpu/tiles)")
    args = parser.parse_args(arguments)
    chosen = [names[name] for name in args.shape]
    if args.estimate:
        os.environ.pop("TRITON_INTERPRET", None)
        write_estimates(chosen, args.folder, write=args.write)
        return
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --estimate needs none")
    with torch.inference_mode():
        for found in records(args.folder if args.write else None, chosen, args.block_m, rounds=args.rounds):
            shape = f"{found['projection']}, {found['rows']} rows"
            print(f"{shape}: {found['us']:.1f} us, {found['gb_per_s']:.0f} GB/s, {found['tile']}", flush=True)


def records(
    folder: Path | None, gemms: Sequence[Gemm] = GEMMS, blocks: Iterable[int] = tuple(ROWS), *, rounds: int
) -> Iterator[dict[str, Any]]:
    """Tune on this machine's GPU, blocks of few rows first: a record for each, written into the tables of `folder`.

    One at a time, so that a stopped run keeps its results.
    """
    machine, key = describe_machine("cuda"), device_key(torch.device("cuda"))
    made = {"device": machine["device"], "multiprocessors": key.multiprocessors, "measured": True} | _made_by(machine)
    for block_m in (m for m in blocks if m in key.rows):
        for gemm in (gemm for gemm in gemms if gemm.bits == 4 or block_m not in PREFILL_ROWS):
            tile, us = tune(gemm, block_m, rounds=rounds)
            rate = gemm.n * gemm.k * gemm.bits / 8 / us / 1e3
            if folder is not None:
                write_card(folder / f"{key.family}.json", made | {"entries": [entry_of(gemm, tile)]})
            yield {"projection": gemm.name, "rows": ROWS[block_m], "us": us, "gb_per_s": rate, "tile": asdict(tile)}


def write_estimates(gemms: Sequence[Gemm], folder: Path, *, write: bool) -> None:
    """Estimate all known GPUs, and write those without measurements into their tables."""
    made_by = _made_by(describe_machine())
    for gpu, entries in estimate_all(GPUS, gemms).items():
        path = folder / f"{gpu.key.family}.json"
        cards = read_json(path)["cards"] if path.exists() else []
        measured = any(card["measured"] and card["device"] == gpu.name for card in cards)
        say(f"{gpu.name}: {len(entries)} entries" + (", skipped: already measured" if measured else ""))
        if write and not measured:
            made = {"device": gpu.name, "multiprocessors": gpu.multiprocessors, "measured": False}
            write_card(path, made | made_by | {"entries": entries})


def _made_by(machine: dict[str, Any]) -> dict[str, Any]:
    return {name: machine[name] for name in ("versions", "commit", "date")}


if __name__ == "__main__":
    assert TILE == 128, "block_n of the candidates divides what a weight is padded to"
    main()
