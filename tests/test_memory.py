"""Memory of the host: what is free, also inside a control group, and what this process uses."""

import mmap
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from qvl_edge import memory
from qvl_edge.memory import Memory, format_bytes, free_memory, host_memory, peak_host_bytes, resident_bytes

CPU = torch.device("cpu")


def test_free_memory_is_that_of_the_host_and_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "host_memory", lambda: Memory(8 << 30, 3 << 30))
    monkeypatch.setattr(memory, "resident_bytes", lambda: 1 << 30)
    assert free_memory(CPU) == 4 << 30


def test_the_host_is_known_where_proc_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(path: Path, *_: object, **__: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", absent)
    found = host_memory()
    assert 0 < found.free < found.total == psutil.virtual_memory().total
    assert free_memory(CPU) > resident_bytes() > 50e6


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("1000000\n", "400000\n", Memory(1_000_000, 600_000)), ("max\n", "400000\n", None), (f"{1 << 60}\n", "0\n", None)],
)
def test_a_control_group_limits_what_is_free(
    limit: str, used: str, expected: Memory | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"memory.max": limit, "memory.current": used}
    monkeypatch.setattr(Path, "read_text", lambda path: said[path.name])
    found = host_memory()
    assert found == expected if expected else found.total == psutil.virtual_memory().total


def test_the_peak_is_no_less_than_what_was_resident() -> None:
    before = resident_bytes()
    block = mmap.mmap(-1, 64 << 20)  # fresh pages: an allocator may have as much from what others have freed
    block.write(bytes(1 << 20) * 64)
    assert resident_bytes() - before > 60e6
    block.close()
    assert peak_host_bytes() >= before + 60e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_large_buffers_that_threads_have_freed_go_back_to_the_system() -> None:
    code = """
import threading
from qvl_edge.memory import resident_bytes, return_buffers
return_buffers()
before = resident_bytes()
threads = [threading.Thread(target=lambda: [len(b"x" * (20 << 20)) for _ in range(4)]) for _ in range(4)]
for each in threads:
    each.start()
for each in threads:
    each.join()
print(resident_bytes() - before)
"""
    assert int(subprocess.check_output([sys.executable, "-c", code])) < 10e6  # 40 to 60 MB without


@pytest.mark.parametrize(("count", "text"), [(12_340_000_000, "12.34 GB"), (1e8, "0.10 GB"), (1_250_000, "1.2 MB")])
def test_sizes_are_written_in_decimal_units(count: float, text: str) -> None:
    assert format_bytes(count) == text
