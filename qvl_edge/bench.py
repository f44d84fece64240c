"""Speed and memory of a whole model: what `qvl-edge bench` measures, each model in a process of its own.

Tokens per second come under llama-bench's names: pp512 is a prompt of 512 tokens, tg128 are 128 tokens after the first,
"@ d2048" means with 2,048 tokens in the cache before. The other rows have units of their own (`unit_of`).
"""

import itertools
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qvl_edge.answer import Answer
from qvl_edge.bundle import VIT, VIT_DATA, is_bundle
from qvl_edge.config import IMAGE_TOKENS, Config
from qvl_edge.engine.device import find_device
from qvl_edge.hub import local_folder
from qvl_edge.memory import device_memory, peak_host_bytes, reset_peak
from qvl_edge.model.loading import expected_tensors
from qvl_edge.runtime import Runtime

TEXT = REPLY = 32  # tokens of a question, and of the answer before turn 2
IMAGE_SHAPE = (768, 1024, 3)  # height, width, RGB
MIB = 2**20
SAMPLE_EVERY_S = 0.02
Call = tuple[Any, ...]
"""A method of Bench and its arguments: what a worker repeats."""
Row = dict[str, Any]


class Bench:
    """A loaded model, and one repetition of each row: name -> value in the row's unit."""

    def __init__(self, path: str, options: dict[str, Any]):
        device = find_device(options.get("device", "auto"))
        folder = local_folder(path, source=options.get("source", "hf"), revision=options.get("revision"))
        self.driver = DriverPeak(device) if device.type == "cuda" else None
        reset_peak()
        self.before = peak_host_bytes()
        start = time.perf_counter()
        self.runtime = Runtime.from_pretrained(folder, **options)
        self.load_s = time.perf_counter() - start
        self.config = self.runtime.config
        self.device: torch.device = self.runtime.decoder.device
        self.dtype = str(self.runtime.decoder.dtype).removeprefix("torch.")
        self.size = weight_bytes(folder)
        self._random = random.Random(0)
        self._fresh = itertools.count()
        self._cached: tuple[int, int] | None = None  # the (count, depth) of `prompt` whose depth the cache holds

    def about(self) -> Row:
        """What runs: the columns before the test."""
        quantization = self.config.quantization
        kind = f"int{quantization.bits} g{quantization.group_size}" if quantization else self.dtype
        return {
            "model": f"Qwen-VL {kind}",
            "size": self.size,
            "params": parameters(self.config),
            "backend": self.device.type.upper(),
            "threads": torch.get_num_threads(),
            "dtype": self.dtype,
            "context": self.runtime.max_context,
        }

    def prompt(self, count: int, depth: int) -> dict[str, float]:
        """Tokens per second of `count` prompt tokens after `depth` cached ones."""
        ids = [*random.Random(1).choices(range(self._text_ids), k=depth), *self._ids(count)]
        ids[depth] = next(self._fresh) % self._text_ids  # no two prompts agree past the depth
        if depth == 0:
            self.runtime.forget()
        elif self._cached != (count, depth):
            # a prompt of the same length: its keys in the cache have this length's NTK alpha
            self.generate([*ids[:depth], next(self._fresh) % self._text_ids, *ids[depth + 1 :]], 1)
            self._cached = (count, depth)
        answer = self.generate(ids, 1)
        self._expect_cached(answer, depth)
        return {row_name("pp", count, depth): count / answer.timing.prefill_s}

    def generation(self, count: int, depth: int) -> dict[str, float]:
        """Tokens per second of `count` tokens after the first, which follows `depth` others (or one)."""
        self._cached = None
        answer = self.generate(self._ids(max(depth, 1)), count + 1)
        return {row_name("tg", count, depth): answer.timing.decode_tokens_per_s}

    def pictures(self, count: int) -> dict[str, float]:
        """Milliseconds per image of `count` images that are encoded at once."""
        self._cached = None
        self.runtime.forget()
        ids, starts, images = self.turn(count, 1)
        answer = self.generate(ids, 1, starts, images)
        return {f"img{count}": 1000 * answer.timing.image_s / count}

    def turns(self) -> dict[str, float]:
        """Milliseconds of wall-clock time to the first token, of two turns about one image."""
        self._cached = None
        self.runtime.forget()
        ids, starts, images = self.turn(1, TEXT)
        first, _ = self._timed(ids, starts, images)
        reply = self.generate(ids, REPLY, starts, images).token_ids
        second, answer = self._timed([*ids, *reply, *self._ids(TEXT)], starts, images)
        self._expect_cached(answer, len(ids) + REPLY - 1)  # the last token was chosen, but never entered the cache
        return {f"ttft img1+{TEXT}": first, "ttft turn 2": second, "turn 2 of turn 1": 100 * second / first}

    def memory(self) -> dict[str, float]:
        """Load time, and the peak since in MiB: to be called last."""
        found = {"load": self.load_s, "load rate": self.size / self.load_s / 1e9}
        return found | {"host before load": self.before / MIB} | {n: size / MIB for n, size in self.peaks().items()}

    def peaks(self) -> dict[str, int]:
        """Bytes since the load, or since `reset_peaks`."""
        found = {"peak host": peak_host_bytes()}
        if self.driver is not None:
            found["peak torch"] = torch.cuda.max_memory_allocated(self.device)
            found["peak card"] = self.driver.bytes
        return found

    def reset_peaks(self) -> None:
        """Start `peaks` again from what is in memory now."""
        reset_peak()
        if self.driver is not None:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.driver.bytes = 0

    @property
    def _text_ids(self) -> int:
        """Ids below it are text."""
        return min(self.runtime.tokenizer.specials.values())

    def _ids(self, count: int) -> list[int]:
        return self._random.choices(range(self._text_ids), k=count)

    def turn(self, count: int, length: int) -> tuple[list[int], list[int], list[Image.Image]]:
        """Ids, image starts and `count` images of noise, new ones each time, of a turn with `length` tokens of text."""
        start = self.config.visual.image_start_id  # <img>, followed by </img> and <imgpad>
        tokens = [start, *[start + 2] * IMAGE_TOKENS, start + 1]
        noise = np.random.default_rng(self._random.getrandbits(32))
        images = [Image.fromarray(noise.integers(0, 256, IMAGE_SHAPE, dtype=np.uint8)) for _ in range(count)]
        starts = [1 + index * len(tokens) for index in range(count)]
        return [*tokens * count, *self._ids(length)], starts, images

    def _timed(self, ids: list[int], starts: list[int], images: list[Image.Image]) -> tuple[float, Answer]:
        start = time.perf_counter()
        answer = self.generate(ids, 1, starts, images)  # ends with its token on the host
        return 1000 * (time.perf_counter() - start), answer

    def generate(
        self, ids: list[int], count: int, starts: Sequence[int] = (), images: Sequence[Image.Image] = ()
    ) -> Answer:
        """`count` greedy tokens, stop tokens included."""
        answer = self.runtime.generate_ids(
            ids, list(starts), images, max_new_tokens=count, do_sample=False, ignore_eos=True
        )
        if len(answer.token_ids) != count:
            raise RuntimeError(f"{len(answer.token_ids)} tokens came where {count} were asked for")
        return answer

    @staticmethod
    def _expect_cached(answer: Answer, count: int) -> None:
        """A prefix that was not reused would be timed under a name that says it was."""
        if answer.usage.cached_tokens != count:
            raise RuntimeError(f"{answer.usage.cached_tokens} prompt tokens were cached where {count} should have been")


class DriverPeak(threading.Thread):
    """Samples the device memory that the driver reports as used, by any program; `bytes` is the peak."""

    def __init__(self, device: torch.device):
        super().__init__(daemon=True)
        self.device, self.bytes = device, 0
        self.start()

    def run(self) -> None:
        """Sample until the process ends."""
        while True:
            memory = device_memory(self.device)
            self.bytes = max(self.bytes, memory.total - memory.free)
            time.sleep(SAMPLE_EVERY_S)


def row_name(kind: str, count: int, depth: int) -> str:
    """As llama-bench writes it: "pp512", "tg128 @ d2048"."""
    return f"{kind}{count}" + (f" @ d{depth}" if depth else "")


def unit_of(row: str) -> str:
    """The unit of a row's values."""
    units = {
        "img": "ms/image",
        "ttft": "ms",
        "turn": "%",
        "load rate": "GB/s",
        "load": "s",
        "peak": "MiB",
        "host": "MiB",
    }
    return next((unit for prefix, unit in units.items() if row.startswith(prefix)), "t/s")


def weight_bytes(path: Path) -> int:
    """Of the weight files in a bundle or a checkpoint."""
    names = ("*.safetensors", "pytorch_model*.bin", VIT, VIT_DATA)
    return sum(file.stat().st_size for name in names for file in path.glob(name))


def parameters(config: Config) -> int:
    """Of the model before it was quantized, which is what "7B" counts."""
    return sum(math.prod(shape) for shape in expected_tensors(replace(config, quantization=None)).values())


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
        if not is_bundle(
            Path(path)
        ):  # may have to be fetched or its vision tower exported, which is not part of a load
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                pool.submit(load_bench, path, options).result()
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self.about: Row = self._pool.submit(load_bench, path, options).result()

    def __call__(self, call: Call) -> dict[str, float]:
        return self._pool.submit(call_bench, *call).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def calls(prompts: Sequence[int], generations: Sequence[int], depths: Sequence[int]) -> list[Call]:
    """Everything that is measured, in order; a count of 0 leaves its rows out."""
    speeds = [("prompt", count, depth) for depth in depths for count in prompts if count]
    speeds += [("generation", count, depth) for depth in depths for count in generations if count]
    return [*speeds, ("pictures", 1), ("pictures", 4), ("turns",)]


def positions(call: Call) -> int:
    """The context that a call needs."""
    match call:
        case ("prompt", count, depth):
            return int(depth + count) + 1
        case ("generation", count, depth):
            return int(max(depth, 1) + count) + 1
        case ("pictures", count):
            return int(count) * (IMAGE_TOKENS + 2) + 2
    return IMAGE_TOKENS + 2 + TEXT + REPLY + TEXT + 1


def measure(
    workers: Sequence[Callable[[Call], dict[str, float]]],
    todo: Sequence[Call],
    *,
    repetitions: int,
    warmup: bool,
    progress: Callable[[str], None],
) -> list[dict[str, list[float]]]:
    """The samples of every row, for each worker.

    Each repetition goes through all workers before the next one, so that a busy moment of the machine hits them all.
    """
    found: list[dict[str, list[float]]] = [{} for _ in workers]
    for number, call in enumerate(todo, 1):
        for run in range(0 if warmup else 1, repetitions + 1):
            for index, worker in enumerate(workers):
                which = f"run {run} of {repetitions}" if run else "warm-up"
                progress(
                    f"test {number} of {len(todo)}, {call[0]} {call[1:]}, model {index + 1} of {len(workers)}: {which}"
                )
                for row, value in worker(call).items():
                    if run:
                        found[index].setdefault(row, []).append(value)
    for index, worker in enumerate(workers):
        found[index] |= {row: [value] for row, value in worker(("memory",)).items()}
    return found


def records(about: Row, samples: dict[str, list[float]]) -> Iterator[Row]:
    """One record per row: what runs, the row's name, its mean, standard deviation and samples."""
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
