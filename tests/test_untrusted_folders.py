"""A model's folder, which may come from anybody, is data: nothing in it is run, and nothing outside it is touched."""

import json
import os
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.job import quantize_checkpoint
from qvl_edge import child
from qvl_edge.__main__ import main
from qvl_edge.bundle import MANIFEST, WORK, read_manifest
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import QuantConfig
from qvl_edge.errors import BundleError, CheckpointError, ConfigError
from qvl_edge.files import replacing
from qvl_edge.lora import LoraCheckpoint
from qvl_edge.model.loading import check_tensors
from qvl_edge.shards import open_shard
from qvl_edge.text.tokenizer import Tokenizer


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file that no command was told about."""
    path = tmp_path / "mine.txt"
    path.write_text("mine", encoding="utf-8")
    return path


def write_manifest(folder: Path, *names: str, fingerprint: str = "0" * 64) -> None:
    folder.mkdir(exist_ok=True)
    part: dict[str, Any] = {"fingerprint": fingerprint, "files": {name: {"bytes": 4, "sha256": ""} for name in names}}
    (folder / MANIFEST).write_text(json.dumps({"format_version": 1, "parts": {"decoder": part}}), encoding="utf-8")


@pytest.mark.parametrize("name", ["../mine.txt", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "C:x", "a\0", "a" * 256])
def test_a_manifest_lists_plain_names_only(tmp_path: Path, name: str) -> None:
    write_manifest(tmp_path / "bundle", name)
    with pytest.raises(BundleError, match="no file of its folder"):
        read_manifest(tmp_path / "bundle")


def test_overwriting_a_bundle_deletes_nothing_outside_of_it(mine: Path, tmp_path: Path, small_checkpoint: Path) -> None:
    source = Checkpoint(small_checkpoint)
    write_manifest(tmp_path / "bundle", "../mine.txt", fingerprint=source.fingerprint)
    with pytest.raises(BundleError, match="no file of its folder"):
        quantize_checkpoint(source, tmp_path / "bundle", QuantConfig(group_size=64), None, overwrite=True)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("name", ["", "lock", "settings.json"])
def test_a_work_folder_of_links_is_refused(mine: Path, tmp_path: Path, small_checkpoint: Path, name: str) -> None:
    bundle = tmp_path / "bundle"
    (bundle / WORK if name else bundle).mkdir(parents=True)
    (bundle / WORK / name).symlink_to(mine if name else mine.parent)
    with pytest.raises(BundleError, match="is a link to"):
        quantize_checkpoint(Checkpoint(small_checkpoint), bundle, QuantConfig(group_size=64), None, overwrite=True)
    assert mine.read_text() == "mine"


def test_a_write_does_not_follow_a_link_that_was_left_for_it(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json.partial").symlink_to(mine)
    with replacing(tmp_path / "report.json") as partial:
        partial.write_text("new", encoding="utf-8")
    assert (tmp_path / "report.json").read_text() == "new" and not (tmp_path / "report.json").is_symlink()
    assert mine.read_text() == "mine"


def test_the_demo_replaces_no_bundle_but_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(tmp_path / "bundle", "mine.txt")
    (tmp_path / "bundle" / "mine.txt").write_text("mine", encoding="utf-8")
    assert main(["demo", "--output", str(tmp_path)]) == 1
    assert "bundle of another model" in capsys.readouterr().err
    assert (tmp_path / "bundle" / "mine.txt").read_text() == "mine"


@pytest.mark.slow
def test_a_command_of_ours_imports_nothing_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "export").mkdir()
    for name in ("export/__init__.py", "export/vit.py", "onnx.py", "torch.py"):
        (tmp_path / name).write_text("raise SystemExit('run from the current folder')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    with child.start("export.vit", "--help", stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "parity report" in said, said


SETTINGS = ("config.json", "generation_config.json", "quantize_config.json", "qwen.tiktoken")


@pytest.mark.parametrize("kind", ["pipe", "device", "link to nothing", "large"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_no_plain_file_are_neither_waited_for_nor_passed_over(
    tmp_path: Path, small_checkpoint: Path, name: str, kind: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_checkpoint, folder)
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "large":
        with (folder / name).open("wb") as file:
            file.truncate(1 << 40)
    else:
        (folder / name).symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.raises((ConfigError, CheckpointError), match=name):
        Tokenizer.from_folder(folder, Checkpoint(folder).config)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("config", "num_hidden_layers", 10**12),
        ("config", "max_position_embeddings", 2**60),
        ("config", "vocab_size", 2**50),
        ("config", "rotary_emb_base", float("inf")),
        ("config", "layer_norm_epsilon", float("nan")),
        ("config", "kv_channels", 1),
        ("visual", "layers", 10**9),
        ("visual", "width", 2**40),
        ("visual", "mlp_ratio", float("nan")),
        ("visual", "mlp_ratio", 1e300),
        ("generation", "max_window_size", "a"),
        ("generation", "max_window_size", -5),
    ],
)
def test_a_number_that_no_model_has_is_an_error_before_anything_is_made_of_it(
    tmp_path: Path, small_checkpoint: Path, section: str, name: str, value: Any
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_checkpoint, folder)
    path = folder / ("generation_config.json" if section == "generation" else "config.json")
    settings = json.loads(path.read_text(encoding="utf-8"))
    (settings["visual"] if section == "visual" else settings)[name] = value
    if name == "kv_channels":
        settings["num_attention_heads"] = settings["hidden_size"]
    path.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ConfigError, match=name):
        Checkpoint(folder)


ADAPTERS = {
    "target_modules": ["(" * 5000 + ")" * 5000, "a|" * 200_000, "(", 5, [["a"]]],
    "modules_to_save": [5],
    "rank_pattern": [[1], {"c_attn": "x"}, {"c_attn": 1.5}],
    "alpha_pattern": [{"c_attn": float("nan")}],
    "r": [10**400, True, 2.5],
    "lora_alpha": [float("nan"), 10**400],
}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option in ADAPTERS for value in ADAPTERS[option]])
def test_an_adapters_settings_of_another_kind_are_named(
    tmp_path: Path, small_checkpoint: Path, option: str, value: Any
) -> None:
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], option: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    sizes = {"A": (2, 128), "B": (384, 2)}
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_{}.weight"
    save_file({name.format(x): torch.zeros(size) for x, size in sizes.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=f"{option.replace('_pattern', '').replace('rank', 'r')}|pattern"):
        LoraCheckpoint(small_checkpoint, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_not_taken_for_some(
    tmp_path: Path, small_checkpoint: Path, dtype: torch.dtype
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    torch.save({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"is {dtype}, expected a float"):
        check_tensors(Checkpoint(folder))


def test_an_archive_that_grows_when_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"(" * (100 << 20))
    with pytest.raises(CheckpointError, match="is compressed"):
        open_shard(path)


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


BAD_FILES: dict[str, Callable[[Path], Any]] = {
    "deep header": lambda path: path.write_bytes(safetensors(b'{"a":' * 100_000)),
    "list": lambda path: path.write_bytes(safetensors(b"[]")),
    "null": lambda path: path.write_bytes(safetensors(b"null")),
    "long header": lambda path: path.write_bytes(safetensors(b" " * (17 << 20), b"x" * 8)),
    "header past the end": lambda path: path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}"),
    "empty": lambda path: path.write_bytes(b""),
    "complex": lambda path: save_file({"a": torch.zeros(2, dtype=torch.complex64)}, path),
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
}
BAD_TENSORS = {
    "meta": {"a": torch.empty(2, device="meta")},
    "sparse": {"a": torch.eye(3).to_sparse()},
    "numbers for names": {0: torch.zeros(1)},
    "complex": {"a": torch.zeros(2, dtype=torch.complex64)},
    "no tensors": {"a": 1},
    "a list": [torch.zeros(1)],
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_no_safetensors_is_a_checkpoint_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    BAD_FILES[kind](path)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        open_shard(path)


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_a_bin_file_of_other_things_than_plain_tensors_is_a_checkpoint_error(tmp_path: Path, kind: str) -> None:
    torch.save(BAD_TENSORS[kind], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        open_shard(tmp_path / "pytorch_model.bin")


def test_what_a_file_calls_its_tensors_does_not_steer_the_terminal() -> None:
    assert str(CheckpointError("no \x1b[2J\x07\u202e of 图 é\n")) == "no \\x1b[2J\\x07\\u202e of 图 é\n"
