"""Threads of a CPU: the number that is asked for, a container's limit, and one pool for the process's life."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import sessions


@pytest.fixture
def torchs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """torch's number of threads, which starts at 8 and is not really set; no pool was made yet."""
    threads = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(sessions, "_pool_threads", [])
    monkeypatch.setattr(sessions, "cpu_quota", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return threads


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "1000 100000"}, 1),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_control_group_is_read(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert sessions.cpu_quota(tmp_path) == expected


@pytest.mark.parametrize(("asked", "omp", "expected"), [(5, None, 5), (None, None, 3), (None, "8", 8), (5, "8", 5)])
def test_what_is_asked_goes_before_omp_num_threads_and_that_before_the_quota(
    asked: int | None, omp: str | None, expected: int, torchs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    sessions.set_threads(asked)
    assert torchs[-1] == expected


def test_another_number_than_the_pools_is_refused(torchs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_pool_threads", [4])
    sessions.set_threads(4)
    with pytest.raises(ValueError, match="threads is 2, but this process's onnxruntime computes with 4"):
        sessions.set_threads(2)
    sessions.set_threads(None)  # a container's limit is 3, and nobody asked
    assert torchs == [8, 4]


def test_the_pool_has_as_many_threads_as_were_asked_for() -> None:
    program = (
        "from kernels import sessions; sessions.set_threads(3); sessions.session_options();"
        "import torch; print(sessions._pool_threads, torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[3] 3"
