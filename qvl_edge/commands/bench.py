"""Speed and memory of a model, in llama-bench's format: qvl-edge bench BUNDLE [-p 512] [-n 128] [-d 0,2048]

Tokens per second, under llama-bench's names: pp512, a prompt of 512 tokens; tg128, 128 tokens after the first one;
"@ d2048", after 2,048 cached tokens. Prompts are token ids, so nothing is tokenized; decoding is greedy, including the
argmax. Other rows, with their units:

    img1, img4        resizing and encoding: one image, and per image of four at once
    ttft img1+32      time to first token of an image and 32 text tokens, nothing cached, wall clock
    ttft turn 2       the same for 32 more tokens about that image, after an answer of 32
    turn 2 of turn 1  the second as a share of the first
    load              time to a Runtime, with the files in the page cache if they are there
    host before load  memory of Python and the libraries
    peak host         peak memory of the process, including these (VmHWM)
    peak torch        on CUDA: peak allocated by torch
    peak card         on CUDA: peak used by any program, as reported by the driver, sampled every 20 ms

Each model runs in its own process, and repetitions alternate between the models, so that other load on the machine
affects all of them alike. --peer is a float checkpoint, computed in float32 on a CPU, as in the original.
"""

import argparse
import csv
import io
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_edge.commands.loading import say
from qvl_edge.errors import ConfigError
from qvl_edge.options import LoadOptions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qvl_edge.bench import Row

MIB, GIB = 2**20, 2**30
PEER_OPTIONS = ("device", "max_context", "source")  # that also hold for the float peer
SHOWN_OPTIONS = ("profile", "kv_cache", "head", "activations")  # have a column if given

EXAMPLES = """examples:
  qvl-edge bench BUNDLE
  qvl-edge bench BUNDLE -p 512,2048 -n 128 -r 3 --output speed.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `qvl-edge bench`."""
    parser.add_argument("path", nargs="*", metavar="PATH", help="bundles or checkpoints")
    parser.add_argument("-m", "--model", action="append", default=[], metavar="PATH", help="same, as in llama-bench")
    parser.add_argument("--peer", metavar="CHECKPOINT", help="a float checkpoint to compare with (float32 on a CPU)")
    parser.add_argument(
        "-p", "--n-prompt", type=counts, default=[512], metavar="N,…", help="prompt tokens (default: 512; 0: none)"
    )
    parser.add_argument(
        "-n", "--n-gen", type=counts, default=[128], metavar="N,…", help="generated tokens (default: 128; 0: none)"
    )
    parser.add_argument("-d", "--n-depth", type=counts, default=[0], metavar="N,…", help="cached tokens (default: 0)")
    parser.add_argument("-r", "--repetitions", type=repetitions, default=5, metavar="N", help="per row (default: 5)")
    parser.add_argument("-o", "--output-format", choices=FORMATS, default="md", help="of stdout (default: md)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="save the result, with the machine, and its chart FILE.svg"
    )
    parser.add_argument("--no-warmup", action="store_true", help="no repetition before the timed ones")
    parser.add_argument("--progress", action="store_true", help="print every repetition to stderr")
    LoadOptions.add_arguments(parser.add_argument_group("loading, of PATH"))


def execute(args: argparse.Namespace) -> int:
    """Measure all models; print, and save with --output."""
    from qvl_edge import bench, plot
    from qvl_edge.files import write_json
    from qvl_edge.machine import describe_machine

    paths = [*args.path, *args.model]
    if not paths:
        raise ConfigError("no model to measure; give a bundle or a checkpoint")
    options = LoadOptions.given(args)
    models = [(path, options) for path in paths] + ([(args.peer, peer_options(options))] if args.peer else [])
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(bench.Worker(path, given))) for path, given in models]
        room = min(worker.about["context"] for worker in workers)
        todo = bench.calls(args.n_prompt, args.n_gen, args.n_depth)
        needs = [(call, bench.positions(call)) for call in todo]
        skipped = [f"{call[0]} {call[1:]} takes {needed}" for call, needed in needs if needed > room]
        if skipped:
            say(f"skipped, the context has {room} positions: {'; '.join(skipped)}")
        samples = bench.measure(
            workers,
            [call for call, needed in needs if needed <= room],
            repetitions=args.repetitions,
            warmup=not args.no_warmup,
            progress=say if args.progress else lambda _: None,
        )
    found: list[Row] = []
    for (path, given), worker, sampled in zip(models, workers, samples, strict=True):
        about = worker.about | {name: given.get(name) for name in SHOWN_OPTIONS}
        if sum(other.about["model"] == about["model"] for other in workers) > 1:
            about["model"] += f" ({Path(path).name})"
        found += bench.records(about, sampled)
    print(FORMATS[args.output_format](found))
    if args.output:
        machine = describe_machine(found[0]["backend"].lower())
        result = {"benchmark": "latency", **machine, "repetitions": args.repetitions, "left_out": skipped}
        write_json(args.output, result | {"records": found})
        with plot.optional():
            plot.save(chart(found), args.output.with_suffix(".svg"), plot.measured_on(result))
    return 0


def peer_options(options: dict[str, Any]) -> dict[str, Any]:
    """Load options of the float peer of models loaded with `options`."""
    import torch

    shared = {name: value for name, value in options.items() if name in PEER_OPTIONS}
    cpu = options.get("device") == "cpu" or not torch.cuda.is_available()
    return shared | ({"dtype": "float32"} if cpu else {})


def counts(text: str) -> list[int]:
    """A comma-separated list of counts; ValueError, reported by argparse, for anything else."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 0:
        raise ValueError(f"{text} holds a negative count")
    return found


def repetitions(text: str) -> int:
    """A count of at least 1; ValueError, reported by argparse, for anything else."""
    count = int(text)
    if count < 1:
        raise ValueError(f"{count} repetitions")
    return count


def markdown(found: "Sequence[Row]") -> str:
    """Two tables: tokens per second as printed by llama-bench, and the rows with other units."""
    speeds = [record for record in found if record["unit"] == "t/s"]
    others = [record for record in found if record["unit"] != "t/s"]
    return "\n\n".join(_table(rows, last) for rows, last in ((speeds, "t/s"), (others, "value")) if rows)


def _table(found: "Sequence[Row]", last: str) -> str:
    own = ("model", "size", "params", "backend", "test", "unit", "avg", "stddev", "samples")
    options = [name for name in found[0] if name not in own and any(record.get(name) is not None for record in found)]
    head = ["model", "size", "params", "backend", *options, "test", last]
    lines = [head]
    for record in found:
        size = f"{record['size'] / MIB:.2f} MiB" if record["size"] < GIB else f"{record['size'] / GIB:.2f} GiB"
        cells = [record["model"], size, parameters_text(record["params"]), record["backend"]]
        cells += [str(record.get(name) or "") for name in options]
        spread = "" if record["stddev"] is None else f" ± {record['stddev']:.2f}"
        unit = "" if record["unit"] == last else f" {record['unit']}"
        lines.append([*cells, record["test"], f"{record['avg']:.2f}{spread}{unit}"])
    columns = []
    for name, *cells in zip(*lines, strict=True):
        width = max(map(len, (name, *cells)))
        left = name in ("model", "backend")
        rule = "-" * width if left else "-" * (width - 1) + ":"
        columns.append([cell.ljust(width) if left else cell.rjust(width) for cell in (name, rule, *cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))


def parameters_text(count: int) -> str:
    """In llama-bench's format: "7.06 M", "9.66 B"."""
    return f"{count / 1e6:.2f} M" if count < 1e9 else f"{count / 1e9:.2f} B"


def as_csv(found: "Sequence[Row]") -> str:
    """With a header; samples are one field, separated by spaces."""
    out = io.StringIO()
    names = list(dict.fromkeys(name for record in found for name in record))
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**record, "samples": " ".join(map(str, record["samples"]))} for record in found)
    return out.getvalue().rstrip()


FORMATS: "dict[str, Callable[[Sequence[Row]], str]]" = {
    "md": markdown,
    "csv": as_csv,
    "json": lambda found: json.dumps(found, indent=1, ensure_ascii=False),
    "jsonl": lambda found: "\n".join(json.dumps(record, ensure_ascii=False) for record in found),
}
PANELS = (  # prefix of the rows' names, title, unit
    ("pp", "Prompt", "tokens per second"),
    ("tg", "Generation", "tokens per second"),
    ("img", "Images", "ms per image"),
    ("ttft", "First token", "ms"),
    ("peak", "Peak memory", "MiB"),
)


def chart(found: "Sequence[Row]") -> "Figure":
    """One panel per kind of row, one colour per model."""
    from qvl_edge import plot

    models, tests = (list(dict.fromkeys(record[key] for record in found)) for key in ("model", "test"))
    values = {(record["model"], record["test"]): record["avg"] for record in found}
    kinds = [(title, unit, [t for t in tests if t.startswith(prefix)]) for prefix, title, unit in PANELS]
    kinds = [kind for kind in kinds if kind[2]]
    figure, axes = plot.panels(len(kinds))
    for panel, (title, unit, rows) in zip(axes, kinds, strict=True):
        panel.set(title=title, ylabel=unit)
        plot.bars(panel, rows, {model: [values.get((model, row)) for row in rows] for model in models})
    return figure
