"""Faults of the machine: each ends in one line that says what to do, no traceback, and leaves no half-written file."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qvl_edge.checkpoint import Checkpoint
from qvl_edge.commands.loading import run_command
from qvl_edge.errors import BundleError, EngineFailed
from qvl_edge.files import cache_home, copy_file, remembered, write_json, write_tensors
from qvl_edge.vit_cache import exported_vit

LIMIT = 4096  # bytes of a file


def fail(error: BaseException) -> Callable[[], int]:
    def execute() -> int:
        raise error

    return execute


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.EMFILE, "Too many open files", "a.py"), 1, "a.py: Too many open files; .*ulimit -n"),
        (OSError(errno.ENOSPC, "No space left on device", "b"), 1, "b: No space left on device; free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "c"), 1, "c: Permission denied; .*XDG_CACHE_HOME"),
        (OSError("odd"), 1, "odd"),
        (MemoryError(), 1, "there is no memory left; `qvl-edge fit`"),
        (EngineFailed("the engine failed (AcceleratorError)"), 1, "the engine failed"),
        (BundleError("what is wrong"), 1, "what is wrong"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_what_goes_wrong_outside_is_one_line(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("name", fail(error)) == code
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.match(rf"(name: )?{said}", line)


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command("name", fail(ZeroDivisionError()))


def test_sigterm_removes_what_is_half_written_and_is_handled_as_before_afterwards(tmp_path: Path) -> None:
    class Killed(dict):  # a value that ends the process while it is being written
        def items(self) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().items()

    before = signal.getsignal(signal.SIGTERM)
    assert run_command("name", lambda: write_json(tmp_path / "a.json", Killed(a=1)) or 0) == 143
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files end at LIMIT bytes, as a full disk would end them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS: dict[str, Callable[[Path], None]] = {
    "json": lambda path: write_json(path, {"a": "x" * 2 * LIMIT}),
    "tensors": lambda path: write_tensors(path, {"a": torch.zeros(2 * LIMIT)}),
    "copy": lambda path: copy_file(Path(sys.executable).resolve(), path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_may_not_grow_leaves_what_was_there(kind: str, tmp_path: Path, small_files: None) -> None:
    (tmp_path / "f").write_text("before", encoding="utf-8")
    with pytest.raises(BundleError, match=r"files in .* is limited \(ulimit -f\).*nothing was replaced"):
        WRITERS[kind](tmp_path / "f")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_cache_that_cannot_be_written_is_named_and_hashes_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_checkpoint: Path
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    checkpoint = Checkpoint(small_checkpoint)
    (tmp_path / "locked" / "vit.lock").mkdir(parents=True)
    for cache in (tmp_path / "file" / "x", tmp_path / "file", tmp_path / "locked", Path("/proc/none")):
        with pytest.raises(BundleError, match=f"{cache}.* cannot be written to.*XDG_CACHE_HOME"):
            exported_vit(checkpoint, dtype="float32", cache_dir=cache)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(BundleError, match="no home folder; set XDG_CACHE_HOME"):
        cache_home()
    assert remembered([tmp_path / "file"], lambda: "computed") == "computed"


@pytest.mark.slow
def test_output_that_nobody_reads_and_few_open_files(tmp_path: Path) -> None:
    command = f"{sys.executable} -m qvl_edge --version"
    said = subprocess.run(
        ["bash", "-c", f"ulimit -n 64; {command} && {command} | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not said.stderr and said.stdout.startswith("qvl-edge ")
    code = "from qvl_edge.commands.loading import run_command; import sys; sys.stdin.read()\n"
    code += "sys.exit(run_command('name', lambda: print('x' * 99) or 0))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stdin is not None and process.stderr is not None
        process.stdin.close()
        assert process.stderr.read() == b"" and process.wait() == 141
