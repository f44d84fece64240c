"""Qwen-VL's two tables of speed and memory, on this machine: python -m benchmarks.qwen_tables BUNDLE [--tokens 256]

As its README measures them. Speed: 1,792 and 7,934 tokens generated after one image of 258 tokens, here over the whole
call, encoding the image and the prompt included. Memory: the peak of a prompt of 1,792 tokens with one image and one
new token, and of the longer generation. `--tokens` makes all of it shorter; the table then says what was measured,
which is never the same figure: a shorter context is faster and takes less. GB are 10^9 bytes.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.latency import Bench, Row, add_model_arguments, describe, model_options, parameters_text
from qvl_edge.config import IMAGE_TOKENS
from qvl_edge.errors import ConfigError
from qvl_edge.files import write_json
from qvl_edge.machine import ends_with_its_message

IMAGE = IMAGE_TOKENS + 2  # with <img> and </img>
ENCODED = 1792  # tokens of the prompt whose memory is measured (README: "2048-258")
GENERATED = {2048: 1792, 8192: 7934}  # tokens, by the column of the table
SPEEDS = tuple(f"Speed ({total} tokens)" for total in GENERATED)
MEMORIES = ("Peak Usage for Encoding 2048 Tokens", "Peak Usage for Generating 8192 Tokens")
# QwenLM/Qwen-VL, README.md, "Inference Speed" and "GPU Memory Usage": A100-SXM4-80G, PyTorch 2.0.1, CUDA 11.4
PUBLISHED = {
    "BF16, published": (28.87, 24.32, 22.60, 28.01),
    "Int4, published": (37.79, 34.34, 11.82, 17.23),
}
PUBLISHED_ON = "9.66 B | A100-SXM4-80G"


def measure(bench: Bench, *, tokens: int | None = None) -> dict[str, Row]:
    """One run of each, after a short one: column -> what was asked for, what was measured, and the figures."""
    room = bench.runtime.max_context
    if room <= IMAGE:
        raise ConfigError(f"max_context is {room}, an image and one token take {IMAGE + 1}; raise --max-context")
    most = room if tokens is None else tokens
    _run(bench, IMAGE, min(8, room - IMAGE))
    found: dict[str, Row] = {}
    length = min(ENCODED, max(IMAGE, most), room - 1)
    found[MEMORIES[0]] = {"asked": ENCODED, "measured": length, **_run(bench, length, 1)}
    for column, count in zip(SPEEDS, GENERATED.values(), strict=True):
        measured = min(count, most, room - IMAGE)
        found[column] = {"asked": count, "measured": measured, **_run(bench, IMAGE, measured)}
    return found | {MEMORIES[1]: found[SPEEDS[1]]}


def _run(bench: Bench, length: int, count: int) -> Row:
    """A new picture, text up to `length` tokens, `count` tokens after it."""
    print(f"{length} tokens in, {count} out", file=sys.stderr, flush=True)
    bench.runtime.forget()
    bench.reset_peaks()
    ids, starts, pictures = bench.turn(1, length - IMAGE)
    began = time.perf_counter()
    bench.generate(ids, count, starts, pictures)
    return {"tokens_per_s": count / (time.perf_counter() - began), "peak_bytes": bench.peaks()}


def tables(found: dict[str, Row], about: Row, device: str) -> str:
    """Both tables as markdown, the published figures above ours, and what was cut short."""
    name, on = about["model"], f"{parameters_text(about['params'])} | {device}"
    ours = [f"{found[column]['tokens_per_s']:.2f}" + _cut(found[column]) for column in SPEEDS]
    speed = _table(SPEEDS, {row: values[:2] for row, values in PUBLISHED.items()}, {name: ours}, on)
    kinds = list(found[MEMORIES[0]]["peak_bytes"])
    rows = {
        f"{name}, {kind.removeprefix('peak ')}": [
            f"{found[column]['peak_bytes'][kind] / 1e9:.2f} GB" + _cut(found[column]) for column in MEMORIES
        ]
        for kind in kinds
    }
    memory = _table(MEMORIES, {row: values[2:] for row, values in PUBLISHED.items()}, rows, on, unit=" GB")
    counted = "host: all of this process; torch: what torch has allocated; card: what the driver counts, any program's"
    return f"{speed}\n\n{memory}\n\n{counted}."


def _cut(run: Row) -> str:
    return "" if run["measured"] == run["asked"] else f" (only {run['measured']} of {run['asked']} tokens)"


def _table(
    columns: tuple[str, ...],
    published: dict[str, tuple[float, ...]],
    ours: dict[str, list[str]],
    on: str,
    unit: str = "",
) -> str:
    lines = [f"| | parameters | on | {' | '.join(columns)} |", "| --- | ---: | --- |" + " ---: |" * len(columns)]
    for row, values in published.items():
        cells = [f"{value:.2f}{unit}" for value in values]
        lines.append(f"| {row} | {PUBLISHED_ON} | {' | '.join(cells)} |")
    lines += [f"| {row} | {on} | {' | '.join(cells)} |" for row, cells in ours.items()]
    return "\n".join(lines)


@ends_with_its_message("benchmarks.qwen_tables")
def main(arguments: list[str] | None = None) -> None:
    """Parse, load, measure, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.qwen_tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="a bundle or a checkpoint")
    parser.add_argument("--tokens", type=int, metavar="N", help="generate N tokens at most, and say so")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="save it, with machine, versions and commit")
    add_model_arguments(parser)
    args = parser.parse_args(arguments)
    if args.tokens is not None and args.tokens < 2:
        parser.error("--tokens has to be 2 or more")
    options: dict[str, Any] = model_options(args)
    bench = Bench(args.path, options)
    found = measure(bench, tokens=args.tokens)
    about, machine = bench.about(), describe(bench.device.type)
    print(tables(found, about, machine["device"]))
    if args.output:
        write_json(args.output, {"benchmark": "qwen_tables", **machine, **about, **options, "runs": found})


if __name__ == "__main__":
    main()
