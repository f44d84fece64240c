"""Files written whole or not at all, JSON lines that a kill has cut short, and locks."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import write_small_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.errors import BundleError, CalibrationError, ConfigError
from qvl_edge.files import (
    append_jsonl,
    check_free_space,
    layout_bytes,
    locked,
    read_json,
    read_jsonl,
    remembered,
    replacing,
    sha256_of,
    write_jsonl,
    write_shard,
    write_tensors,
)

ROOT = Path(__file__).parent.parent


def test_a_stopped_write_leaves_the_old_file_and_no_half_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("ne")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["file"] and path.read_text() == "old"


def test_a_full_disk_is_said_with_the_free_bytes_and_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(BundleError, match=r"disk of .* is full \(\d+ bytes free\)"), replacing(path) as partial:
        partial.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_a_device_that_is_really_full_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is full"), replacing(tmp_path / "file") as partial:
        partial.symlink_to("/dev/full")
        with open(partial, "wb", buffering=0) as file:
            file.write(b"x")
    assert os.listdir(tmp_path) == []


def test_too_little_space_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="MB free; free some space"):
        check_free_space(tmp_path, 1 << 60)


def test_written_tensors_are_read_back(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(6).reshape(2, 3).T})
    (tmp_path / "config.json").write_text((write_small_checkpoint(tmp_path / "c") / "config.json").read_text())
    assert Checkpoint(tmp_path)["x"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert not any(name.startswith(VISUAL) for name in Checkpoint(tmp_path).names)


def test_json_lines_are_read_as_written_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "two\nlines, and \u2028"}, {"text": "框"}]
    write_jsonl(path, rows[:1])
    append_jsonl(path, rows[1:])
    assert list(read_jsonl(path)) == [(1, rows[0]), (2, rows[1])]
    path.write_bytes(b"\xef\xbb\xbf\r\n" + json.dumps(rows[0]).encode() + b"\r\n\n{}")  # as Windows' editors write
    assert list(read_jsonl(path)) == [(2, rows[0]), (4, {})]


@pytest.mark.parametrize("cut", [b'{"a": 2', b'{"a": "\xe6\xa1', b"{"])
def test_a_line_that_a_kill_cut_short_is_skipped_when_resuming_only(tmp_path: Path, cut: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + cut)
    assert list(read_jsonl(path, resuming=True)) == [(1, {"a": 1})]
    with pytest.raises(ConfigError, match=r"rows.jsonl, line 2 is not valid JSON"):
        list(read_jsonl(path))
    path.write_bytes(cut + b"\n")  # a whole line was not cut: the file is damaged
    with pytest.raises(CalibrationError, match="line 1 is not valid JSON"):
        list(read_jsonl(path, resuming=True, error=CalibrationError))


@pytest.mark.parametrize("line", ["[1]", "1" * 5000, "[" * 100_000])
def test_a_line_that_is_not_an_object_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{{}}\n{line}\n")
    with pytest.raises(ConfigError, match="rows.jsonl, line 2"):
        list(read_jsonl(path))


def test_missing_json_lines_are_none_when_resuming_only(tmp_path: Path) -> None:
    assert not list(read_jsonl(tmp_path / "no.jsonl", resuming=True))
    with pytest.raises(ConfigError, match="no.jsonl is missing"):
        list(read_jsonl(tmp_path / "no.jsonl"))
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        list(read_jsonl(tmp_path))


@pytest.mark.parametrize(
    ("content", "wrong"), [(b"\xe9t\xe9", "is not UTF-8 text"), (None, "cannot be read: Is a directory")]
)
def test_json_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, wrong: str) -> None:
    path = tmp_path / "config.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(BundleError, match=f"config.json {wrong}"):
        read_json(path, error=BundleError)
    other = tmp_path / "bom.json"
    other.write_bytes(b'\xef\xbb\xbf{"a": 1}')  # as Windows' editors write
    assert read_json(other) == {"a": 1}


def test_a_lock_is_held_against_other_processes_and_ends_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    code = f"""
from pathlib import Path
from qvl_edge.files import locked
with locked(Path({str(path)!r})):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(BundleError, match="another one is at work"), locked(path, busy="another one is at work"):
            pass
        holder.kill()
        holder.wait()
    with locked(path, busy="another one is at work"), pytest.raises(ZeroDivisionError), locked(tmp_path / "other"):
        _ = 1 / 0
    with locked(path):
        assert path.exists()


TENSORS = {
    "odd": torch.randn(7, 3),
    "a": torch.randn(5, 4).to(torch.bfloat16),
    "transformer.h.0.ln_1.weight": torch.randn(9).half(),
    "words": torch.randint(-(2**31), 2**31, (4, 6)).to(torch.int32),
}
LAYOUT = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def rows(name: str) -> Iterator[Tensor]:
    return iter(TENSORS[name].split(2))


def test_pieces_read_back_as_whole_tensors(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", LAYOUT, rows)
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert layout_bytes(LAYOUT) == sum(tensor.nbytes for tensor in TENSORS.values())


@pytest.mark.parametrize("pieces", [1, 3], ids=["too few", "too many"])
def test_pieces_that_do_not_add_up_leave_no_file(pieces: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"odd has 21 values, and its pieces {14 * pieces}"):
        write_shard(tmp_path / "a.safetensors", LAYOUT, lambda name: [torch.ones(14)] * pieces)
    assert list(tmp_path.iterdir()) == []


def test_a_piece_of_another_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"odd is torch\.float32, and a piece of it torch\.float16"):
        write_shard(tmp_path / "a.safetensors", LAYOUT, lambda name: [TENSORS[name].half()])
    assert list(tmp_path.iterdir()) == []


def test_what_was_computed_of_files_is_kept_until_one_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, computed = tmp_path / "file", []

    def digest() -> str:
        computed.append(file.read_bytes())
        return sha256_of(file)

    for content, age in ((b"one", 60), (b"two", 60), (b"two", 50), (b"new", 0)):
        file.write_bytes(content)
        os.utime(file, (time.time() - age,) * 2)
        assert remembered([file], digest) == remembered([file], digest) == sha256_of(file)
    # by size, time and inode once each; what has just been written twice
    assert computed == [b"one", b"two", b"two", b"new", b"new"]
