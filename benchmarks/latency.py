"""Speed and memory of a model that answers: python -m benchmarks.latency BUNDLE [--peer CHECKPOINT] [-p 512] [-n 128]

Tokens a second, under llama-bench's names: pp512, a prompt of 512 tokens; tg128, 128 tokens after the first one;
"@ d2048", with 2,048 tokens in the cache before. Prompts are ids, so nothing is tokenized; decoding is greedy, and its
argmax is part of a step. Rows of this model's own, each with its unit:

    img1, img4        a picture alone, and each of four at once: resized and encoded
    ttft img1+32      first token of a picture and 32 tokens of text, nothing cached, by the clock on the wall
    ttft turn 2       first token of 32 more tokens about the same picture, after an answer of 32
    turn 2 of turn 1  the share of the one in the other
    load              from nothing to a Runtime, with the files in the page cache if the system has them there
    host before load  Python and the libraries, in memory
    peak host         the most of it, those included (VmHWM)
    peak torch        on CUDA: the most that torch has allocated
    peak card         on CUDA: the most that the driver counts on the card, any program's, asked every 20 ms

Each model has a process of its own, and every repetition of a row goes through all models before the next one, so that
a busy moment of the machine hits all. --peer is a float checkpoint; on the CPU it computes in float32 as the original.
"""

import argparse
import csv
import io
import itertools
import json
import math
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image

from benchmarks.plot import Panel, framed
from qvl_edge import Runtime
from qvl_edge.answer import Answer
from qvl_edge.bundle import VIT, VIT_DATA, is_bundle
from qvl_edge.config import IMAGE_TOKENS, Config
from qvl_edge.engine.device import find_device
from qvl_edge.files import replacing, write_json
from qvl_edge.machine import describe_machine, ends_with_its_message
from qvl_edge.memory import device_memory, peak_host_bytes, reset_peak
from qvl_edge.model.loading import expected_tensors

TEXT = REPLY = 32  # tokens of a question, and of the answer before turn 2
PICTURE = (768, 1024, 3)  # of noise: height, width, RGB
MIB = 2**20
SAMPLED_S = 0.02
Job = tuple[Any, ...]
"""A method of Bench and its arguments."""
Row = dict[str, Any]


class Bench:
    """A loaded model, and one repetition of each row: name -> value in the row's unit."""

    def __init__(self, path: str, options: dict[str, Any]):
        device = find_device(options["device"])
        self.card = CardPeak(device) if device.type == "cuda" else None
        reset_peak()
        self.before = peak_host_bytes()
        began = time.perf_counter()
        self.runtime = Runtime.from_pretrained(path, **options)
        self.load_s = time.perf_counter() - began
        self.config = self.runtime.config
        self.device: torch.device = self.runtime.decoder.device
        self.dtype = str(self.runtime.decoder.dtype).removeprefix("torch.")
        self.size = weight_bytes(Path(path))
        self._random = random.Random(0)
        self._heads = itertools.count()
        self._deep: tuple[int, int] | None = None  # the (n_prompt, n_depth) whose depth the cache holds

    def about(self) -> Row:
        """What runs: the columns before the test."""
        quantization = self.config.quantization
        what = f"int{quantization.bits} g{quantization.group_size}" if quantization else self.dtype
        return {
            "model": f"Qwen-VL {what}",
            "size": self.size,
            "params": parameters(self.config),
            "backend": self.device.type.upper(),
            "threads": torch.get_num_threads(),
            "dtype": self.dtype,
            "context": self.runtime.max_context,
        }

    def prompt(self, count: int, depth: int) -> dict[str, float]:
        """Tokens a second of `count` prompt tokens after `depth` others."""
        ids = [*random.Random(1).choices(range(self._plain), k=depth), *self._ids(count)]
        ids[depth] = next(self._heads) % self._plain  # no two prompts agree past the depth
        if depth == 0:
            self.runtime.forget()
        elif self._deep != (count, depth):
            # a prompt of the same length: what it leaves in the cache has this length's NTK alpha
            self.generate([*ids[:depth], next(self._heads) % self._plain, *ids[depth + 1 :]], 1)
            self._deep = (count, depth)
        answer = self.generate(ids, 1)
        self._expect_cached(answer, depth)
        return {row_name("pp", count, depth): count / answer.timing.prefill_s}

    def generation(self, count: int, depth: int) -> dict[str, float]:
        """Tokens a second of `count` tokens after the first, which follows `depth` others (or one)."""
        self._deep = None
        answer = self.generate(self._ids(max(depth, 1)), count + 1)
        return {row_name("tg", count, depth): answer.timing.decode_tokens_per_s}

    def pictures(self, count: int) -> dict[str, float]:
        """Milliseconds of each of `count` pictures that are encoded at once."""
        self._deep = None
        self.runtime.forget()
        ids, starts, pictures = self.turn(count, 1)
        answer = self.generate(ids, 1, starts, pictures)
        return {f"img{count}": 1000 * answer.timing.image_s / count}

    def turns(self) -> dict[str, float]:
        """Milliseconds to the first token of two turns about one picture, by the clock on the wall."""
        self._deep = None
        self.runtime.forget()
        ids, starts, pictures = self.turn(1, TEXT)
        first, _ = self._timed(ids, starts, pictures)
        reply = self.generate(ids, REPLY, starts, pictures).token_ids
        second, answer = self._timed([*ids, *reply, *self._ids(TEXT)], starts, pictures)
        self._expect_cached(answer, len(ids) + REPLY - 1)  # the last token was chosen, but never entered the cache
        return {f"ttft img1+{TEXT}": first, "ttft turn 2": second, "turn 2 of turn 1": 100 * second / first}

    def memory(self) -> dict[str, float]:
        """Loading, and the peak since, in MiB: to be asked for last."""
        found = {"load": self.load_s, "load rate": self.size / self.load_s / 1e9}
        return found | {"host before load": self.before / MIB} | {n: size / MIB for n, size in self.peaks().items()}

    def peaks(self) -> dict[str, int]:
        """Bytes since the load, or since `reset_peaks`."""
        found = {"peak host": peak_host_bytes()}
        if self.card is not None:
            found["peak torch"] = torch.cuda.max_memory_allocated(self.device)
            found["peak card"] = self.card.bytes
        return found

    def reset_peaks(self) -> None:
        """Let `peaks` start from what is in memory now."""
        reset_peak()
        if self.card is not None:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.card.bytes = 0

    @property
    def _plain(self) -> int:
        """Ids below it are text."""
        return min(self.runtime.tokenizer.specials.values())

    def _ids(self, count: int) -> list[int]:
        return self._random.choices(range(self._plain), k=count)

    def turn(self, count: int, length: int) -> tuple[list[int], list[int], list[Image.Image]]:
        """Ids, first slots and pictures, never the same ones, of a turn with `length` tokens of text."""
        start = self.config.visual.image_start_id  # <img>, followed by </img> and <imgpad>
        picture = [start, *[start + 2] * IMAGE_TOKENS, start + 1]
        noise = np.random.default_rng(self._random.getrandbits(32))
        pictures = [Image.fromarray(noise.integers(0, 256, PICTURE, dtype=np.uint8)) for _ in range(count)]
        starts = [1 + index * len(picture) for index in range(count)]
        return [*picture * count, *self._ids(length)], starts, pictures

    def _timed(self, ids: list[int], starts: list[int], pictures: list[Image.Image]) -> tuple[float, Answer]:
        began = time.perf_counter()
        answer = self.generate(ids, 1, starts, pictures)  # its token has come to the host
        return 1000 * (time.perf_counter() - began), answer

    def generate(
        self, ids: list[int], count: int, starts: Sequence[int] = (), pictures: Sequence[Image.Image] = ()
    ) -> Answer:
        """Greedily, by `count` tokens whatever they are."""
        answer = self.runtime.generate_ids(
            ids, list(starts), pictures, max_new_tokens=count, do_sample=False, ignore_eos=True
        )
        if len(answer.token_ids) != count:
            raise RuntimeError(f"{len(answer.token_ids)} tokens came where {count} were asked for")
        return answer

    @staticmethod
    def _expect_cached(answer: Answer, count: int) -> None:
        """What is not reused would be timed under a name that says it was."""
        if answer.usage.cached_tokens != count:
            raise RuntimeError(f"{answer.usage.cached_tokens} prompt tokens were cached where {count} should have been")


class CardPeak(threading.Thread):
    """The most bytes of a card that its driver has counted as taken, by any program: `bytes`, kept until the end."""

    def __init__(self, device: torch.device):
        super().__init__(daemon=True)
        self.device, self.bytes = device, 0
        self.start()

    def run(self) -> None:
        """Sample until the process ends."""
        while True:
            memory = device_memory(self.device)
            self.bytes = max(self.bytes, memory.total - memory.free)
            time.sleep(SAMPLED_S)


def row_name(kind: str, count: int, depth: int) -> str:
    """As llama-bench writes it: "pp512", "tg128 @ d2048"."""
    return f"{kind}{count}" + (f" @ d{depth}" if depth else "")


def unit_of(row: str) -> str:
    """What a row's values are in."""
    units = {
        "img": "ms/image",
        "ttft": "ms",
        "turn": "%",
        "load rate": "GB/s",
        "load": "s",
        "peak": "MiB",
        "host": "MiB",
    }
    return next((unit for beginning, unit in units.items() if row.startswith(beginning)), "t/s")


def weight_bytes(path: Path) -> int:
    """Of the files of weights in a bundle or a checkpoint."""
    names = ("*.safetensors", "pytorch_model*.bin", VIT, VIT_DATA)
    return sum(file.stat().st_size for name in names for file in path.glob(name))


def parameters(config: Config) -> int:
    """Of the model before it was quantized, which is what "7B" counts."""
    return sum(math.prod(shape) for shape in expected_tensors(replace(config, quantization=None)).values())


def parameters_text(count: int) -> str:
    """As llama-bench writes it: "7.06 M", "9.66 B"."""
    return f"{count / 1e6:.2f} M" if count < 1e9 else f"{count / 1e9:.2f} B"


_bench: Bench | None = None  # a worker process has one


def load_bench(path: str, options: dict[str, Any]) -> Row:
    """In a worker: load, and say what it is."""
    global _bench
    _bench = Bench(path, options)
    return _bench.about()


def call_bench(method: str, *arguments: Any) -> dict[str, float]:
    """In a worker: one repetition."""
    found: dict[str, float] = getattr(_bench, method)(*arguments)
    return found


class Worker:
    """A model in a process of its own, so that its memory is its own too."""

    def __init__(self, path: str, options: dict[str, Any]):
        if not is_bundle(path):  # its vision tower may have to be exported first, which is no part of a load
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                pool.submit(load_bench, path, options).result()
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self.about: Row = self._pool.submit(load_bench, path, options).result()

    def __call__(self, job: Job) -> dict[str, float]:
        return self._pool.submit(call_bench, *job).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def jobs(prompts: Sequence[int], generations: Sequence[int], depths: Sequence[int]) -> list[Job]:
    """Everything that is measured, in order; a count of 0 leaves its rows out."""
    speeds = [("prompt", count, depth) for depth in depths for count in prompts if count]
    speeds += [("generation", count, depth) for depth in depths for count in generations if count]
    return [*speeds, ("pictures", 1), ("pictures", 4), ("turns",)]


def positions(job: Job) -> int:
    """The context that a job takes."""
    match job:
        case ("prompt", count, depth):
            return int(depth + count) + 1
        case ("generation", count, depth):
            return int(max(depth, 1) + count) + 1
        case ("pictures", count):
            return int(count) * (IMAGE_TOKENS + 2) + 2
    return IMAGE_TOKENS + 2 + TEXT + REPLY + TEXT + 1


def measure(
    workers: Sequence[Callable[[Job], dict[str, float]]],
    todo: Sequence[Job],
    *,
    repetitions: int,
    warmup: bool,
    progress: Callable[[str], None],
) -> list[dict[str, list[float]]]:
    """The samples of every row, for each worker."""
    found: list[dict[str, list[float]]] = [{} for _ in workers]
    for number, job in enumerate(todo, 1):
        for run in range(0 if warmup else 1, repetitions + 1):
            for index, worker in enumerate(workers):
                said = f"run {run} of {repetitions}" if run else "warm-up"
                progress(
                    f"test {number} of {len(todo)}, {job[0]} {job[1:]}, model {index + 1} of {len(workers)}: {said}"
                )
                for row, value in worker(job).items():
                    if run:
                        found[index].setdefault(row, []).append(value)
    for index, worker in enumerate(workers):
        found[index] |= {row: [value] for row, value in worker(("memory",)).items()}
    return found


def records(about: Row, samples: dict[str, list[float]]) -> Iterator[Row]:
    """One record a row: what runs, the row, its mean, standard deviation and samples."""
    for row, values in samples.items():
        deviation = statistics.stdev(values) if len(values) > 1 else None
        yield {
            **about,
            "test": row,
            "unit": unit_of(row),
            "avg": statistics.fmean(values),
            "stddev": deviation,
            "samples": values,
        }


def markdown(found: Sequence[Row]) -> str:
    """Two tables: tokens a second as llama-bench prints them, and the rows with units of their own."""
    speeds = [record for record in found if record["unit"] == "t/s"]
    others = [record for record in found if record["unit"] != "t/s"]
    tables = [_table(speeds, "t/s", with_unit=False)] if speeds else []
    return "\n\n".join([*tables, _table(others, "value", with_unit=True)])


def _table(found: Sequence[Row], last: str, *, with_unit: bool) -> str:
    own = ("model", "size", "params", "backend", "test", "unit", "avg", "stddev", "samples")
    options = [name for name in found[0] if name not in own and any(record.get(name) is not None for record in found)]
    head = ["model", "size", "params", "backend", *options, "test", last]
    lines = [head]
    for record in found:
        size = f"{record['size'] / MIB:.2f} MiB" if record["size"] < 2**30 else f"{record['size'] / 2**30:.2f} GiB"
        cells = [record["model"], size, parameters_text(record["params"]), record["backend"]]
        cells += [str(record.get(name) or "") for name in options]
        lines.append([*cells, record["test"], _value(record, with_unit=with_unit)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    left = {head.index(name) for name in ("model", "backend")}
    rows = [
        " | ".join(cell.ljust(w) if column in left else cell.rjust(w) for column, (cell, w) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    rule = " | ".join("-" * w if column in left else "-" * (w - 1) + ":" for column, w in enumerate(widths))
    return "\n".join(f"| {row} |" for row in (rows[0], rule, *rows[1:]))


def _value(record: Row, *, with_unit: bool) -> str:
    spread = "" if record["stddev"] is None else f" ± {record['stddev']:.2f}"
    return f"{record['avg']:.2f}{spread}" + (f" {record['unit']}" if with_unit else "")


def as_csv(found: Sequence[Row]) -> str:
    """All records with their columns' names; the samples in one field, separated by spaces."""
    out = io.StringIO()
    names = list(dict.fromkeys(name for record in found for name in record))
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**record, "samples": " ".join(map(str, record["samples"]))} for record in found)
    return out.getvalue().rstrip()


FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {
    "md": markdown,
    "csv": as_csv,
    "json": lambda found: json.dumps(found, indent=1, ensure_ascii=False),
    "jsonl": lambda found: "\n".join(json.dumps(record, ensure_ascii=False) for record in found),
}
PANELS = (  # beginning of the rows' names, title, unit
    ("pp", "Prompt", "tokens a second"),
    ("tg", "Generation", "tokens a second"),
    ("img", "Pictures", "ms an image"),
    ("ttft", "First token", "ms"),
    ("peak", "Peak memory", "MiB"),
)


def picture(result: Row) -> str:
    """SVG of a result: one panel a kind of row, one colour a model."""
    found = result["records"]
    models = list(dict.fromkeys(record["model"] for record in found))
    panels: list[Panel] = []
    for beginning, title, unit in PANELS:
        rows = list(dict.fromkeys(r["test"] for r in found if r["test"].startswith(beginning)))
        values = {(record["model"], record["test"]): record["avg"] for record in found}
        if rows:
            top = max(value for (_, row), value in values.items() if row in rows)
            panels.append(Panel(len(panels), title, unit, top * 1.1))
            panels[-1].bars(rows, {model: [values.get((model, row)) for row in rows] for model in models})
    return framed(panels, result, f"{result['threads']} threads")


def save(result: Row, path: Path) -> None:
    """The JSON, and its picture beside it."""
    write_json(path, result)
    with replacing(path.with_suffix(".svg")) as partial:
        partial.write_text(picture(result), encoding="utf-8")


def describe(device: str) -> Row:
    """describe_machine, and the version of what encodes pictures."""
    machine = describe_machine(device)
    machine["versions"]["onnxruntime"] = onnxruntime.__version__
    return machine


def counts(said: str) -> list[int]:
    """A comma list of counts; ValueError, which argparse reports, for anything else."""
    found = [int(part) for part in said.split(",")]
    if min(found) < 0:
        raise ValueError(f"{said} holds a negative count")
    return found


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """How the model is loaded: what Runtime.from_pretrained takes."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", help="of the arithmetic (float32, on CUDA float16)")
    parser.add_argument("--profile", help="auto, 12g, 8g or 6g")
    parser.add_argument("--kv-cache", help="float16 or int8")
    parser.add_argument("--head", help="float16 or int8")
    parser.add_argument("--max-context", type=int, metavar="N", help="positions to allow (the model's)")


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, and the device."""
    names = ("device", "dtype", "profile", "kv_cache", "head", "max_context")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


@ends_with_its_message("benchmarks.latency")
def main(arguments: list[str] | None = None) -> None:
    """Parse, load, measure, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="*", metavar="PATH", help="bundles or checkpoints, measured in turn")
    parser.add_argument(
        "-m", "--model", action="append", default=[], metavar="PATH", help="the same, as in llama-bench"
    )
    parser.add_argument("--peer", metavar="CHECKPOINT", help="a float checkpoint beside it (float32 on the CPU)")
    parser.add_argument("-p", "--n-prompt", type=counts, default=[512], metavar="N,…", help="512; 0: none")
    parser.add_argument("-n", "--n-gen", type=counts, default=[128], metavar="N,…", help="128; 0: none")
    parser.add_argument("-d", "--n-depth", type=counts, default=[0], metavar="N,…", help="tokens cached before (0)")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="of every row (5)")
    parser.add_argument("-o", "--output-format", choices=FORMATS, default="md", help="of stdout (md)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="save it, and FILE.svg, with machine and commit"
    )
    parser.add_argument("--no-warmup", action="store_true", help="count the first repetition too")
    parser.add_argument("--progress", action="store_true", help="a line on stderr for every repetition")
    add_model_arguments(parser)
    args = parser.parse_args(arguments)
    paths = [*args.path, *args.model]
    if not paths or args.repetitions < 1:
        parser.error("give a bundle or a checkpoint, and 1 repetition or more")
    options = model_options(args)
    models = [(path, options) for path in paths]
    if args.peer:
        cpu = args.device == "cpu" or not torch.cuda.is_available()
        peer = {name: value for name, value in options.items() if name in ("device", "max_context")}
        models.append((args.peer, peer | ({"dtype": "float32"} if cpu else {})))
    workers: list[Worker] = []
    try:
        for path, given in models:
            workers.append(Worker(path, given))
        room = min(worker.about["context"] for worker in workers)
        todo = jobs(args.n_prompt, args.n_gen, args.n_depth)
        left_out = [f"{job[0]} {job[1:]} takes {positions(job)}" for job in todo if positions(job) > room]
        if left_out:
            print(f"left out, the context has {room} positions: {'; '.join(left_out)}", file=sys.stderr)
        samples = measure(
            workers,
            [job for job in todo if positions(job) <= room],
            repetitions=args.repetitions,
            warmup=not args.no_warmup,
            progress=lambda line: print(line, file=sys.stderr, flush=True) if args.progress else None,
        )
    finally:
        for worker in workers:
            worker.close()
    asked = ("profile", "kv_cache", "head")
    found: list[Row] = []
    for (path, given), worker, sampled in zip(models, workers, samples, strict=True):
        about = worker.about | {name: given.get(name) for name in asked}
        if sum(other.about["model"] == about["model"] for other in workers) > 1:
            about["model"] += f" ({Path(path).name})"
        found += records(about, sampled)
    print(FORMATS[args.output_format](found))
    if args.output:
        machine = describe(found[0]["backend"].lower())
        save(
            {
                "benchmark": "latency",
                **machine,
                "repetitions": args.repetitions,
                "left_out": left_out,
                "records": found,
            },
            args.output,
        )


if __name__ == "__main__":
    main()
