"""The GPU benchmarks run end to end in Triton's interpreter, and a run that is cut off tells what it has found."""

import importlib
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs the triton package, which Linux has")

from benchmarks import plot  # noqa: E402
from benchmarks.gpu import Report  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
# a plain checkout has nothing but torch, triton and numpy
FORBIDDEN = (
    "PIL",
    "safetensors",
    "tiktoken",
    "onnxruntime",
    "onnx",
    "transformers",
    "matplotlib",
    "psutil",
    "filelock",
    "pydantic",
    "pytest",
)
RUN = f"""
import runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FORBIDDEN!r}:
            raise ImportError(name + " is not installed")
sys.meta_path.insert(0, Finder())
import triton_interpreter
sys.argv = ["gpu", *sys.argv[1:]]
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def test_all_of_it_runs_with_torch_triton_and_numpy_only(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", RUN, "--tiny", "--device", "cpu", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    result = json.loads((tmp_path / "out/gpu.json").read_text())
    assert result["finished"] and not result["failed"] and all(check["holds"] for check in result["checks"])
    assert {"layer", "decode_step", "int4_gemm", "rotary_attention"} <= set(result)
    assert {"device", "versions", "commit", "date"} <= set(result)
    peers = result["int4_gemm"][0]["peers"]
    assert {"float16", "int4"} <= set(peers) and all(peer["error"] < 1.5e-3 for peer in peers.values())
    assert not (tmp_path / "out/gpu.svg").exists() and "pip install 'qvl-edge[plot]'" in run.stderr
    plot.main([str(tmp_path / "out/gpu.json")])  # where matplotlib is
    drawing = ElementTree.parse(tmp_path / "out/gpu.svg").getroot()
    words = {text.strip() for text in drawing.itertext()}
    assert {"Products of a layer, as launched", "Whole decode steps, one sequence", "c_attn"} <= words


def report(path: Path, minutes: float) -> Report:
    return Report(path, {"device": "a card", "versions": {}, "threads": 1, "commit": "", "date": ""}, minutes)


def test_each_result_is_on_disk_when_the_next_is_made(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    mine = report(path, 1.0)

    def work() -> Iterator[dict[str, Any]]:
        for number in range(3):
            assert len(json.loads(path.read_text()).get("numbers", [])) == number
            yield {"number": number}

    mine.run("numbers 0", "numbers", work)
    assert [record["number"] for record in json.loads(path.read_text())["numbers"]] == [0, 1, 2]


def test_a_task_that_fails_is_a_result_and_the_others_go_on(tmp_path: Path) -> None:
    mine = report(tmp_path / "gpu.json", 1.0)

    def broken() -> Iterator[dict[str, Any]]:
        yield {"number": 1}
        raise SystemExit("off by 1e-1, allowed is 5e-4")

    mine.run("broken", "broken", broken)
    mine.run("whole", "whole", lambda: iter([{"number": 2}]))
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["failed"][0]["task"] == "broken" and "off by 1e-1" in result["failed"][0]["error"]
    assert len(result["broken"]) == len(result["whole"]) == 1


def test_time_that_is_used_up_is_said(tmp_path: Path) -> None:
    mine = report(tmp_path / "gpu.json", 0.005)

    def slow() -> Iterator[dict[str, Any]]:
        yield {"number": 1}
        time.sleep(0.4)
        yield {"number": 2}
        yield {"number": 3}

    mine.run("numbers", "numbers", slow)
    mine.run("letters", "letters", slow)
    assert mine.result["left_out"] == ["the rest of numbers, after 2 records", "letters"]


def test_the_same_command_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    path, ran = tmp_path / "gpu.json", []

    def task(name: str, *, stopped: bool = False) -> Iterator[dict[str, Any]]:
        ran.append(name)
        yield {"number": 1}
        if stopped:
            raise KeyboardInterrupt
        yield {"number": 2}

    first = report(path, 1.0)
    first.run("a", "found", lambda: task("a"))
    with pytest.raises(KeyboardInterrupt):
        first.run("b", "found", lambda: task("b", stopped=True))
    second = report(path, 1.0)
    for name in ("a", "b", "c"):
        second.run(name, "found", lambda name=name: task(name))
    assert ran == ["a", "b", "b", "c"]
    assert [(r["task"], r["number"]) for r in second.result["found"]] == [(n, i) for n in "abc" for i in (1, 2)]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"commit": "another"}))
    assert report(path, 1.0).result["done"] == []


def test_a_device_that_a_task_broke_ends_the_run_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = report(tmp_path / "gpu.json", 1.0)

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(SystemExit, match="a left the device unusable .*run the same command again"):
        mine.run("a", "found", lambda: iter([{"number": 1}]))
    assert report(tmp_path / "gpu.json", 1.0).result["done"] == ["a"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here they would run")
@pytest.mark.parametrize("name", ["gpu", "tune"])
def test_without_a_gpu_each_benchmark_says_so(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main = importlib.import_module(f"benchmarks.{name}").main
    arguments = ["--device", "cuda", *(["--out", str(tmp_path)] if name == "gpu" else [])]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_a_result_with_nothing_in_it_has_no_chart(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    report(path, 1.0)
    with pytest.raises(SystemExit, match="holds nothing to draw"):
        plot.main([str(path)])
    assert not path.with_suffix(".svg").exists()
