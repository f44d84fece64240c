"""The measurements of `qvl-edge bench`, each model in its own process.

Rows of tokens per second have llama-bench's names: pp512, a prompt of 512 tokens; tg128, 128 tokens after the first;
"@ d2048", after 2,048 cached tokens. The others have their own units (`unit_of`).
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
"""The name of a method of Bench, and its arguments."""
Row = dict[str, Any]


class Bench:
    """A loaded model. Each method is one repetition of some rows: name -> value in the row's unit."""

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
        self._cached: tuple[int, int] | None = None  # (count, depth) of the `prompt` whose depth is cached

    def about(self) -> Row:
        """The columns that describe the model."""
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
        ids[depth] = next(self._fresh) % self._text_ids  # prompts differ from there on
        if depth == 0:
            self.runtime.forget()
        elif self._cached != (count, depth):
            # of the same length, because the cached keys depend on its NTK alpha
            self.generate([*ids[:depth], next(self._fresh) % self._text_ids, *ids[depth + 1 :]], 1)
            self._cached = (count, depth)
        answer = self.generate(ids, 1)
        self._expect_cached(answer, depth)
        return {row_name("pp", count, depth): count / answer.timing.prefill_s}

    def generation(self, count: int, depth: int) -> dict[str, float]:
        """Tokens per second of `count` tokens, the first excluded, after a prompt of max(`depth`, 1)."""
        self._cached = None
        answer = self.generate(self._ids(max(depth, 1)), count + 1)
        return {row_name("tg", count, depth): answer.timing.decode_tokens_per_s}

    def pictures(self, count: int) -> dict[str, float]:
        """Milliseconds per image of `count` images encoded at once."""
        ids, starts, images = self.turn(count, 1)
        answer = self.generate(ids, 1, starts, images)
        return {f"img{count}": 1000 * answer.timing.image_s / count}

    def turns(self) -> dict[str, float]:
        """Milliseconds to the first token, wall clock, of two turns about one image."""
        ids, starts, images = self.turn(1, TEXT)
        first, _ = self._timed(ids, starts, images)
        reply = self.generate(ids, REPLY, starts, images).token_ids
        second, answer = self._timed([*ids, *reply, *self._ids(TEXT)], starts, images)
        self._expect_cached(answer, len(ids) + REPLY - 1)  # the last token is not in the cache
        return {f"ttft img1+{TEXT}": first, "ttft turn 2": second, "turn 2 of turn 1": 100 * second / first}

    def memory(self) -> dict[str, float]:
        """Load time, and peaks since in MiB; call it last."""
        found = {"load": self.load_s, "load rate": self.size / self.load_s / 1e9}
        return found | {"host before load": self.before / MIB} | {n: size / MIB for n, size in self.peaks().items()}

    def peaks(self) -> dict[str, int]:
        """Bytes, since the load or `reset_peaks`."""
        found = {"peak host": peak_host_bytes()}
        if self.driver is not None:
            found["peak torch"] = torch.cuda.max_memory_allocated(self.device)
            found["peak card"] = self.driver.bytes
        return found

    def reset_peaks(self) -> None:
        """Start `peaks` again from the current use."""
        reset_peak()
        if self.driver is not None:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.driver.bytes = 0

    @property
    def _text_ids(self) -> int:
        """Ids below this are text."""
        return min(self.runtime.tokenizer.specials.values())

    def _ids(self, count: int) -> list[int]:
        return self._random.choices(range(self._text_ids), k=count)

    def turn(self, count: int, length: int) -> tuple[list[int], list[int], list[Image.Image]]:
        """Empty the caches; (ids, image starts, images) of a turn: `count` noise images, `length` text tokens."""
        self._cached = None
        self.runtime.forget()
        start = self.config.visual.image_start_id  # <img>, followed by </img> and <imgpad>
        tokens = [start, *[start + 2] * IMAGE_TOKENS, start + 1]
        noise = np.random.default_rng(self._random.getrandbits(32))
        images = [Image.fromarray(noise.integers(0, 256, IMAGE_SHAPE, dtype=np.uint8)) for _ in range(count)]
        starts = [1 + index * len(tokens) for index in range(count)]
        return [*tokens * count, *self._ids(length)], starts, images

    def _timed(self, ids: list[int], starts: list[int], images: list[Image.Image]) -> tuple[float, Answer]:
        start = time.perf_counter()
        answer = self.generate(ids, 1, starts, images)  # returns once its token is on the host
        return 1000 * (time.perf_counter() - start), answer

    def generate(
        self, ids: list[int], count: int, starts: Sequence[int] = (), images: Sequence[Image.Image] = ()
    ) -> Answer:
        """`count` greedy tokens, stop tokens included."""
        answer = self.runtime.generate_ids(
            ids, list(starts), images, max_new_tokens=count, do_sample=False, ignore_eos=True
        )
        if len(answer.token_ids) != count:
            raise RuntimeError(f"{len(answer.token_ids)} tokens were generated, expected {count}")
        return answer

    @staticmethod
    def _expect_cached(answer: Answer, count: int) -> None:
        """RuntimeError unless `count` prompt tokens were reused, as the row's name says."""
        if answer.usage.cached_tokens != count:
            raise RuntimeError(f"{answer.usage.cached_tokens} prompt tokens were cached where {count} should have been")


class DriverPeak(threading.Thread):
    """Samples the device memory in use by any program, as reported by the driver; `bytes` is the peak."""

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
    """In llama-bench's format: "pp512", "tg128 @ d2048"."""
    return f"{kind}{count}" + (f" @ d{depth}" if depth else "")


def unit_of(row: str) -> str:
    """The unit of a row's values, by the beginning of its name."""
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
    """Of the weight files of a bundle or checkpoint."""
    names = ("*.safetensors", "pytorch_model*.bin", VIT, VIT_DATA)
    return sum(file.stat().st_size for name in names for file in path.glob(name))


def parameters(config: Config) -> int:
    """Of the model before quantization, as counted in "7B"."""
    return sum(math.prod(shape) for shape in expected_tensors(replace(config, quantization=None)).values())


_bench: Bench | None = None  # a worker process has one


def load_bench(path: str, options: dict[str, Any]) -> Row:
    """In a worker: load, and return `Bench.about`."""
    global _bench
    _bench = Bench(path, options)
    return _bench.about()


def call_bench(method: str, *arguments: Any) -> dict[str, float]:
    """In a worker: one repetition."""
    return getattr(_bench, method)(*arguments)


class Worker:
    """A model in its own process, so that its memory can be measured."""

    def __init__(self, path: str, options: dict[str, Any]):
        if not is_bundle(Path(path)):  # a download or an export of the vision tower must not count as loading
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
    """All calls, in order; a count of 0 has none."""
    speeds = [("prompt", count, depth) for depth in depths for count in prompts if count]
    speeds += [("generation", count, depth) for depth in depths for count in generations if count]
    return [*speeds, ("pictures", 1), ("pictures", 4), ("turns",)]


def positions(call: Call) -> int:
    """The context length that a call needs."""
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
    """For each worker, the samples of every row.

    Repetitions alternate between the workers, so that other load on the machine affects all of them alike.
    """
    found: list[dict[str, list[float]]] = [{} for _ in workers]
    for number, call in enumerate(todo, 1):
        for run in range(0 if warmup else 1, repetitions + 1):
            for index, worker in enumerate(workers):
                test = f"test {number} of {len(todo)}, {call[0]} {call[1:]}, model {index + 1} of {len(workers)}"
                progress(f"{test}: " + (f"run {run} of {repetitions}" if run else "warm-up"))
                for row, value in worker(call).items():
                    if run:
                        found[index].setdefault(row, []).append(value)
    for index, worker in enumerate(workers):
        found[index] |= {row: [value] for row, value in worker(("memory",)).items()}
    return found


def records(about: Row, samples: dict[str, list[float]]) -> Iterator[Row]:
    """One record per row: the model's columns, the row's name, unit, mean, standard deviation and samples."""
    for row, values in samples.items():
        deviation = statistics.stdev(values) if len(values) > 1 else None
        figures = {"avg": statistics.fmean(values), "stddev": deviation, "samples": values}
        yield {**about, "test": row, "unit": unit_of(row), **figures}
