"""The compiled kernels run, in an interpreter of their PTX that checks what compute-sanitizer would (tests/ptx)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs the triton package, which Linux has")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)  # beside the script's own folder
    command = [sys.executable, str(ROOT / "tests/ptx/cases.py")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_kernel_computes_its_definition_and_keeps_to_its_memory(lines: list[dict[str, Any]]) -> None:
    cases = {line["case"]: line for line in lines if "case" in line}
    assert len(cases) >= 17 and {name[:5] for name in cases} == {"sm_75", "sm_86"}
    for line in cases.values():
        assert line["error"] < line["allowed"], line


@pytest.mark.parametrize("kernel", ["sm_86 decode", "sm_75 few rows", "sm_86 attention"])
def test_a_barrier_that_is_missing_is_found(lines: list[dict[str, Any]], kernel: str) -> None:
    (found,) = (line["caught"] for line in lines if line.get("damaged") == kernel and "bar" in line["kind"])
    # the compiler sets a few where no two warps meet, as before the first use of shared memory
    assert len(found) > 10 and sum(bool(fault) for fault in found) >= 0.85 * len(found), found
    kinds = {"race: "} | ({"releases what other warps stored"} if kernel != "sm_86 attention" else set())
    assert all(any(kind in fault for fault in found) for kind in kinds)


def test_a_wait_for_a_copy_that_is_missing_is_found(lines: list[dict[str, Any]]) -> None:
    (found,) = (line["caught"] for line in lines if line.get("damaged") == "sm_86 decode" and "wait" in line["kind"])
    assert len(found) >= 2 and all(found)
