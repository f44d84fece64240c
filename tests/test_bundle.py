"""The bundle on disk: whole or refused, each refusal with the command that mends it."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import write_small_checkpoint

from qvl_edge.bundle import MANIFEST, WORK, Bundle, add_part, check_free_space, replacing, write_tensors
from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.errors import BundleError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with a float decoder and stand-in bytes for the vision tower, which is not opened here."""
    folder = write_small_checkpoint(tmp_path / "bundle")
    fingerprint = Checkpoint(folder).fingerprint
    add_part(folder, "decoder", ["config.json", "model.safetensors", "qwen.tiktoken"], fingerprint=fingerprint)
    (folder / "vit.onnx").write_bytes(b"graph")
    (folder / "vit.onnx.data").write_bytes(b"weights")
    add_part(folder, "vit", ["vit.onnx", "vit.onnx.data"], fingerprint=fingerprint)
    return folder


def test_a_whole_bundle_opens_and_knows_its_parts(bundle: Path) -> None:
    opened = Bundle.open(bundle, verify=True)
    assert opened.vit == bundle / "vit.onnx"
    assert opened.fingerprint == Checkpoint(bundle).fingerprint
    assert opened.checkpoint.config == opened.config


def test_a_folder_without_manifest_is_answered_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="python -m quantize.gptq CHECKPOINT"):
        Bundle.open(tmp_path)


def test_a_stopped_quantization_says_that_it_resumes(tmp_path: Path) -> None:
    (tmp_path / WORK).mkdir()
    with pytest.raises(BundleError, match="run the same command again and it resumes"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(("part", "command"), [("vit", "export.vit"), ("decoder", "quantize.gptq")])
def test_a_missing_part_is_answered_with_its_command(bundle: Path, part: str, command: str) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    del manifest["parts"][part]
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=f"no {part} yet. Make it with:\n  python -m {command}"):
        Bundle.open(bundle)


def test_halves_of_two_models_are_refused_when_written_and_when_opened(bundle: Path) -> None:
    with pytest.raises(BundleError, match="of another model"):
        add_part(bundle, "vit", ["vit.onnx"], fingerprint="f" * 64)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["parts"]["vit"]["fingerprint"] = "f" * 64
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="mixes two models"):
        Bundle.open(bundle)


def test_a_changed_file_is_found_by_its_hash(bundle: Path) -> None:
    (bundle / "vit.onnx.data").write_bytes(b"weightz")
    with pytest.raises(BundleError, match="sha256"):
        Bundle.open(bundle)


def test_a_cut_or_missing_file_is_named_with_both_sizes(bundle: Path) -> None:
    (bundle / "vit.onnx.data").write_bytes(b"wei")
    with pytest.raises(BundleError, match="has 3 bytes, bundle.json says 7"):
        Bundle.open(bundle)
    (bundle / "vit.onnx.data").unlink()
    with pytest.raises(BundleError, match="vit.onnx.data is missing"):
        Bundle.open(bundle)


def test_a_manifest_cannot_name_files_outside_the_bundle(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["parts"]["vit"]["files"]["../x"] = {"bytes": 1, "sha256": ""}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="not a file of the bundle"):
        Bundle.open(bundle)


def test_an_unknown_format_version_is_refused(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text()) | {"format_version": 99}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="format_version 99, this version reads 1"):
        Bundle.open(bundle)


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
