"""qvl-edge bench measures what its rows say: fixed counts, fresh or reused prefixes, models in turn."""

import csv
import io
import json
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.latency import main
from qvl_edge.__main__ import main as qvl_edge
from qvl_edge.answer import Answer
from qvl_edge.bench import Bench, Call, calls, measure, parameters, records, row_name, unit_of
from qvl_edge.commands import bench as command
from qvl_edge.published import published_config

pytestmark = pytest.mark.slow

CPU = {"device": "cpu", "max_context": 1200}


class Watched:
    """A Bench, and every answer that its runtime gives."""

    def __init__(self, path: Path, **options: Any):
        self.bench = Bench(str(path), CPU | options)
        self.answers: list[Answer] = []
        answer = self.bench.runtime.generate_ids

        def watch(*arguments: Any, **given: Any) -> Answer:
            self.answers.append(answer(*arguments, **given))
            return self.answers[-1]

        self.bench.runtime.generate_ids = watch  # type: ignore[method-assign]


@pytest.fixture(autouse=True, scope="module")
def cache(vit_cache: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(vit_cache.parent))
        yield


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model runs in a thread: of two processes each spends seconds on its imports."""
    monkeypatch.setattr("qvl_edge.bench.ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))


@pytest.mark.parametrize("depth", [0, 60, 200])
def test_a_prompt_is_prefilled_past_its_depth_and_nothing_else_is(
    depth: int, make_checkpoint: Callable[..., Path]
) -> None:
    # 60 + 32 tokens are past seq_length, so that the depth alone would have another NTK alpha than both together
    watched = Watched(make_checkpoint("model", seq_length=64))
    for _ in range(3):
        assert watched.bench.prompt(32, depth)[row_name("pp", 32, depth)] > 0
        usage = watched.answers[-1].usage
        assert (usage.prompt_tokens, usage.cached_tokens) == (depth + 32, depth)


def test_as_many_tokens_are_generated_as_the_row_says(make_checkpoint: Callable[..., Path]) -> None:
    watched = Watched(make_checkpoint("model"))
    for depth in (0, 50):
        assert set(watched.bench.generation(24, depth)) == {row_name("tg", 24, depth)}
        answer = watched.answers[-1]
        assert answer.timing.decoded_tokens == 24 and answer.usage.prompt_tokens == max(depth, 1)


def test_pictures_are_new_each_time(make_checkpoint: Callable[..., Path]) -> None:
    watched = Watched(make_checkpoint("model"))
    for _ in range(2):
        assert watched.bench.pictures(4)["img4"] > 0
        usage = watched.answers[-1].usage
        assert (usage.images, usage.cached_images, usage.cached_tokens) == (4, 0, 0)


def test_turn_1_is_fresh_and_turn_2_reuses_all_of_it(make_checkpoint: Callable[..., Path]) -> None:
    watched = Watched(make_checkpoint("model"))
    for _ in range(2):
        found = watched.bench.turns()
        first, _reply, second = (answer.usage for answer in watched.answers[-3:])
        assert (first.cached_tokens, first.cached_images, first.prompt_tokens) == (0, 0, 258 + 32)
        assert second.cached_images == 1 and second.prompt_tokens - second.cached_tokens == 33  # its text and one token
        share = 100 * found["ttft turn 2"] / found["ttft img1+32"]
        assert found["turn 2 of turn 1"] == pytest.approx(share)


def test_a_prefix_that_was_not_reused_is_no_figure(make_checkpoint: Callable[..., Path]) -> None:
    watched = Watched(make_checkpoint("model"))
    bench = watched.bench
    answer = bench.runtime.generate_ids

    def forgetful(*arguments: Any, **given: Any) -> Answer:
        bench.runtime.forget()
        return answer(*arguments, **given)

    bench.runtime.generate_ids = forgetful  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="0 prompt tokens were cached where 40 should have been"):
        bench.prompt(16, 40)


def test_memory_holds_the_load_and_a_peak_above_the_libraries(make_checkpoint: Callable[..., Path]) -> None:
    path = make_checkpoint("model")
    bench = Bench(str(path), CPU)
    found = bench.memory()
    assert found["load"] > 0 and found["peak host"] >= found["host before load"] > 50
    assert bench.about()["size"] == (path / "model.safetensors").stat().st_size


class Counted:
    """A worker that counts its calls in a list shared with others."""

    def __init__(self, name: str, made: list[tuple[str, str]]):
        self.name, self.made = name, made

    def __call__(self, call: Call) -> dict[str, float]:
        self.made.append((self.name, call[0]))
        return {str(call[0]): float(len(self.made))}


@pytest.mark.parametrize("warmup", [True, False])
def test_models_take_turns_and_the_warm_up_does_not_count(warmup: bool) -> None:
    made: list[tuple[str, str]] = []
    workers = [Counted(name, made) for name in "ab"]
    found = measure(workers, [("one",), ("two",)], repetitions=2, warmup=warmup, progress=lambda _: None)
    rounds = 3 if warmup else 2
    expected = [(name, call) for call in ("one", "two") for _ in range(rounds) for name in "ab"]
    assert made == [*expected, ("a", "memory"), ("b", "memory")]
    assert all(len(samples["one"]) == len(samples["two"]) == 2 for samples in found)
    assert found[0]["one"] == ([3, 5] if warmup else [1, 3])


def test_calls_leave_out_what_has_no_count() -> None:
    assert calls([512, 0], [0], [0, 64]) == [
        ("prompt", 512, 0), ("prompt", 512, 64), ("pictures", 1), ("pictures", 4), ("turns",)
    ]  # fmt: skip


ABOUT = {"model": "Qwen-VL int4 g128", "size": 3 * 2**20, "params": 7_064_448, "backend": "CPU", "threads": 2}
SAMPLES = {"pp512": [100.0, 110.0, 105.0], "tg128 @ d64": [20.0, 22.0, 27.0], "img4": [8.0, 9.0, 10.0], "load": [0.5]}


def test_a_record_has_the_mean_and_the_deviation_of_its_samples() -> None:
    found = {record["test"]: record for record in records(ABOUT, SAMPLES)}
    assert found["tg128 @ d64"]["avg"] == 23 and found["tg128 @ d64"]["stddev"] == pytest.approx(13**0.5)
    assert found["load"]["stddev"] is None and found["load"]["unit"] == "s"
    assert [found[name]["unit"] for name in SAMPLES] == ["t/s", "t/s", "ms/image", "s"]
    assert unit_of("peak card") == unit_of("host before load") == "MiB" and unit_of("turn 2 of turn 1") == "%"


def test_the_table_has_the_shape_of_llama_bench() -> None:
    speeds, others = command.markdown(list(records(ABOUT, SAMPLES))).split("\n\n")

    def cells(text: str) -> list[list[str]]:
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]

    assert cells(speeds)[0] == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    row = ["Qwen-VL int4 g128", "3.00 MiB", "7.06 M", "CPU", "2", "pp512", "105.00 ± 5.00"]
    assert cells(speeds)[2] == row and cells(speeds)[3][-2:] == ["tg128 @ d64", "23.00 ± 3.61"]
    assert [line[-2:] for line in cells(others)[2:]] == [["img4", "9.00 ± 1.00 ms/image"], ["load", "0.50 s"]]
    assert len({len(line) for line in speeds.splitlines()}) == 1  # aligned


def test_every_format_holds_the_same_figures() -> None:
    found = list(records(ABOUT, SAMPLES))
    assert json.loads(command.FORMATS["json"](found)) == found
    assert [json.loads(line) for line in command.FORMATS["jsonl"](found).splitlines()] == found
    rows = list(csv.DictReader(io.StringIO(command.FORMATS["csv"](found))))
    for row, record in zip(rows, found, strict=True):
        assert float(row["avg"]) == statistics.fmean(map(float, row["samples"].split())) == record["avg"]


def test_parameters_are_those_before_quantization() -> None:
    published, int4 = published_config("Qwen/Qwen-VL-Chat"), published_config("Qwen/Qwen-VL-Chat-Int4")
    assert published and int4 and parameters(published) == parameters(int4)
    assert command.parameters_text(parameters(int4)) == "9.66 B"  # 9.6 B in Qwen-VL's README


def test_all_of_it_runs_beside_a_peer_and_is_saved_with_its_picture(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = str(make_checkpoint("model")), tmp_path / "latency.json"
    arguments = [
        "-p",
        "16",
        "-n",
        "4",
        "-d",
        "0,8",
        "-r",
        "2",
        "-o",
        "jsonl",
        "--device",
        "cpu",
        "--max-context",
        "1200",
    ]
    main([path, "--peer", path, *arguments, "--dtype", "bfloat16", "--no-warmup", "--progress", "--output", str(out)])
    said = capsys.readouterr()
    found = [json.loads(line) for line in said.out.splitlines()]
    result = json.loads(out.read_text())
    assert result["records"] == found and {"device", "versions", "commit", "date"} <= set(result)
    names = {"pp16", "pp16 @ d8", "tg4", "tg4 @ d8", "img1", "img4", "ttft img1+32", "ttft turn 2", "peak host"}
    for model in ("Qwen-VL bfloat16", "Qwen-VL float32"):
        mine = {record["test"]: record for record in found if record["model"] == model}
        assert names <= set(mine) and len(mine["pp16"]["samples"]) == 2
    assert "run 2 of 2" in said.err and "warm-up" not in said.err
    drawing = ElementTree.parse(out.with_suffix(".svg")).getroot()
    written = " ".join(text for text in drawing.itertext() if text.strip())
    assert all(word in written for word in ("pp16 @ d8", "ttft turn 2", "Peak memory", "Qwen-VL float32"))


@pytest.mark.usefixtures("in_this_process")
def test_what_the_context_cannot_hold_is_left_out_and_said(
    make_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(make_checkpoint("model"))
    main([path, "-p", "16,599,600", "-n", "0", "-r", "1", "--device", "cpu", "--max-context", "600", "-o", "jsonl"])
    said = capsys.readouterr()
    tests = {json.loads(line)["test"] for line in said.out.splitlines()}
    assert {"pp16", "pp599", "img1", "ttft turn 2"} <= tests and not tests & {"pp600", "img4"}
    assert "600 positions: prompt (600, 0) takes 601; pictures (4,) takes 1034" in said.err


@pytest.mark.usefixtures("in_this_process")
def test_a_model_that_cannot_be_loaded_is_said_in_one_line() -> None:
    with pytest.raises(SystemExit, match="neither a local folder"):
        main(["no/such/folder", "--device", "cpu"])


@pytest.mark.parametrize("arguments", [["x", "-p", "a"], ["x", "-d", "-1"], ["x", "-r", "0"]])
def test_nonsense_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "error:" in capsys.readouterr().err


@pytest.mark.usefixtures("in_this_process")
def test_the_command_of_the_wheel_is_the_same_one(
    make_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(make_checkpoint("model"))
    assert qvl_edge(["bench", path, "-p", "16", "-n", "0", "-r", "1", "--device", "cpu", "--max-context", "300"]) == 0
    assert "| pp16 |" in capsys.readouterr().out
    assert qvl_edge(["bench"]) == 1 and "no model to measure" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="benchmarks.latency: no model to measure"):
        main([])


@pytest.mark.usefixtures("in_this_process")
def test_without_matplotlib_the_figures_are_saved_and_what_to_install_is_said(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it raises ImportError
    path, out = str(make_checkpoint("model")), tmp_path / "bench.json"
    main([path, "-p", "16", "-n", "0", "-r", "1", "--device", "cpu", "--max-context", "300", "--output", str(out)])
    assert json.loads(out.read_text())["benchmark"] == "latency" and not out.with_suffix(".svg").exists()
    assert "pip install 'qvl-edge[plot]'" in capsys.readouterr().err
