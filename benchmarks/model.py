"""The time of each decode kernel by a model, without a GPU: python -m benchmarks.model [--gpu 3060 …] [--rows 1 16]

Every launch of a decode step is compiled for a card and modelled from its control bits, its occupancy, its bytes in
flight and its waves (benchmarks/kernels/model.py), and stands beside its roofline: its bytes at the card's published
bandwidth. These are not measurements. `--measured gpu.json` sets them beside those of benchmarks.gpu on the same card.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import torch

from benchmarks import report
from benchmarks.kernels.model import END_US, MERGE_US, START_US, Work, launch_us, roofline_us
from benchmarks.kernels.offline import GPUS, HEAD_DIM, HEADS, Gpu, attention_launch, compile_launch, gemm_launch
from benchmarks.kernels.problem import HEAD, LAYER, Gemm
from kernels.gpu.attention import decode_config, splits_for
from kernels.gpu.tiles import tile_for
from qvl_edge import markdown

H100 = Gpu("NVIDIA H100 80GB HBM3", 90, 132, 3350, 1.70)  # takes the H200's tiles, as it has as many multiprocessors
CARDS = (*GPUS, H100)
SHOWN = ("2060", "T4", "3060", "4070", "4090", "H100")
LAYERS, CONTEXT = 32, 2048
CUBLAS = 0.85  # of the bandwidth, which cuBLAS is taken to reach for the float16 head
# what a layer's four products are to take at most, in units of their roofline, by rows
GOALS = {"3060": {1: 1.15, 16: 1.35}, "4070": {1: 1.15, 16: 1.35}, "H100": {1: 1.6}}


def gemm_record(gpu: Gpu, gemm: Gemm, rows: int) -> dict[str, Any]:
    """One product with the tile that the runtime takes; more rows than its block are several launches (Turing)."""
    tile = tile_for(rows, gemm.n, gemm.k, gemm.group, bits=gemm.bits, device=gpu.key)
    compiled = compile_launch(gemm_launch(gemm, tile, one_row=rows == 1), gpu.capability)
    stages = 2 if gpu.key.turing else tile.num_stages
    us = launch_us(gpu, Work.of_gemm(gemm, tile), compiled, num_warps=tile.num_warps, stages=stages)
    nbytes = gemm.n * gemm.k * (gemm.bits / 8 + (2 / gemm.group if gemm.bits == 4 else 0))
    return _record(gemm.name, us * -(-rows // tile.block_m), roofline_us(gpu, nbytes)) | {"tile": asdict(tile)}


def attention_record(gpu: Gpu, rows: int, cache: torch.dtype = torch.float16) -> dict[str, Any]:
    """Attention of `rows` sequences over CONTEXT positions each."""
    config = decode_config(HEAD_DIM, cache)
    splits = splits_for(HEADS * rows, CONTEXT, HEAD_DIM, cache, gpu.multiprocessors)
    compiled = compile_launch(attention_launch("decode_kernel", cache, 1, splits=splits, logn=False), gpu.capability)
    positions = config["LANES"] * config["STEPS"]
    row_bytes = 2 * (HEAD_DIM * cache.itemsize + (2 if cache == torch.int8 else 0))
    work = Work(
        HEADS * rows * splits,
        -(-CONTEXT // splits // positions),
        positions * row_bytes,
        END_US + (MERGE_US if splits > 1 else 0),
    )
    us = launch_us(gpu, work, compiled, num_warps=config["num_warps"], stages=2)
    return _record("attention", us, roofline_us(gpu, HEADS * rows * CONTEXT * row_bytes)) | {"splits": splits}


def _record(name: str, us: float, roofline: float) -> dict[str, Any]:
    return {"kernel": name, "us": round(us, 1), "roofline_us": round(roofline, 1), "ratio": round(us / roofline, 2)}


def step_record(gpu: Gpu, rows: int) -> dict[str, Any]:
    """A whole step of `rows` sequences: its kernels, the four products of a layer together, and tokens per second."""
    kernels = [gemm_record(gpu, gemm, rows) for gemm in LAYER]
    layer = _record("layer", *(sum(kernel[name] for kernel in kernels) for name in ("us", "roofline_us")))
    attention, head = attention_record(gpu, rows), gemm_record(gpu, HEAD, rows)
    blocks = LAYERS * (layer["us"] + attention["us"])
    wide = roofline_us(gpu, 2 * HEAD.n * HEAD.k) / CUBLAS + START_US + END_US
    return {
        "gpu": gpu.name,
        "rows": rows,
        "layer": layer,
        "kernels": [*kernels, attention, head],
        "tokens_per_s": {
            "float16 head": round(1e6 * rows / (blocks + wide), 1),
            "int8 head": round(1e6 * rows / (blocks + head["us"]), 1),
        },
    }


def short(gpu: Gpu) -> str:
    """The part of a card's name that --gpu takes."""
    return gpu.name.removeprefix("NVIDIA ").removeprefix("GeForce RTX ").removeprefix("Tesla ").split()[0].split("-")[0]


def measured(record: dict[str, Any], result: dict[str, Any]) -> Iterator[str]:
    """Lines that set the kernels of a step beside those of a gpu.json on the same card."""
    if result.get("device") != record["gpu"]:
        return
    for entry in result.get("layer", []):
        if entry["rows"] == record["rows"]:
            for kernel in record["kernels"]:
                if (found := entry["projections"].get(kernel["kernel"])) is not None:
                    yield (
                        f"{kernel['kernel']}, {record['rows']} rows: modelled {kernel['us']:.1f} us, measured "
                        f"{found['us']:.1f} us, {found['us'] / kernel['us']:.2f} of it"
                    )


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: microseconds by the model, and in units of the roofline."""
    names = [kernel["kernel"] for kernel in records[0]["kernels"]]
    rows = [
        [
            record["gpu"],
            record["rows"],
            *(f"{kernel['us']:.0f} ({kernel['ratio']:.2f})" for kernel in [record["layer"], *record["kernels"]]),
            *record["tokens_per_s"].values(),
        ]
        for record in records
    ]
    head = ["card", "rows", "layer's products, us (of roofline)", *names, *records[0]["tokens_per_s"]]
    return markdown.table(head, rows)


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 1 if a goal is missed and --goals was given."""
    parser = report.command("model", __doc__)
    known = list(dict.fromkeys(short(gpu) for gpu in CARDS))
    parser.add_argument("--gpu", nargs="+", choices=known, default=SHOWN, help="cards (default: some of each family)")
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 16), help="sequences of a step (default: 1 16)")
    parser.add_argument("--measured", type=Path, metavar="gpu.json", help="a result of benchmarks.gpu to compare with")
    parser.add_argument("--goals", action="store_true", help="exit with 1 if a layer misses its goal")
    report.add_save(parser)
    args = parser.parse_args(arguments)
    chosen = [gpu for gpu in CARDS if short(gpu) in args.gpu]
    records = [step_record(gpu, rows) for gpu in chosen for rows in args.rows]
    print(f"modelled, not measured; {CONTEXT} positions, {LAYERS} layers\n\n{table(records)}")
    missed = 0
    for record in records:
        goal = next((goals for name, goals in GOALS.items() if name in record["gpu"]), {}).get(record["rows"])
        if goal is not None and record["layer"]["ratio"] > goal:
            missed += 1
            print(f"{record['gpu']}, {record['rows']} rows: {record['layer']['ratio']} of the roofline, goal {goal}")
        if args.measured is not None:
            print(*measured(record, json.loads(args.measured.read_text())), sep="\n")
    report.save(args.json, "model", "cpu", modelled=True, context=CONTEXT, steps=records)
    return int(args.goals and missed > 0)


if __name__ == "__main__":
    sys.exit(main())
