"""The bundle on disk: whole or refused, each refusal with the command that mends it."""

import json
from pathlib import Path

import pytest
from conftest import write_small_checkpoint

from qvl_edge.bundle import MANIFEST, WORK, Bundle, add_part, check_same_source
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.errors import BundleError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with a float decoder and stand-in bytes for the vision tower, which is not opened here."""
    folder = write_small_checkpoint(tmp_path / "bundle")
    fingerprint = Checkpoint(folder).fingerprint
    add_part(folder, "decoder", ["config.json", "model.safetensors", "qwen.tiktoken"], fingerprint=fingerprint)
    (folder / "vit.onnx").write_bytes(b"graph")
    (folder / "vit.onnx.data").write_bytes(b"weights")
    add_part(folder, "vit", ["vit.onnx", "vit.onnx.data"], fingerprint=fingerprint, info={"dtype": "float16"})
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


def test_a_git_lfs_pointer_in_the_place_of_a_file_is_named(bundle: Path) -> None:
    (bundle / "vit.onnx.data").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 7\n")
    with pytest.raises(BundleError, match=r"vit\.onnx\.data is a Git LFS pointer.*\n  git -C .* lfs pull"):
        Bundle.open(bundle)


def test_a_manifest_cannot_name_files_outside_the_bundle(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["parts"]["vit"]["files"]["../x"] = {"bytes": 1, "sha256": ""}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="no file of its folder"):
        Bundle.open(bundle)


def test_an_unknown_format_version_is_refused(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text()) | {"format_version": 99}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="format_version 99, this version reads 1"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (["parts"], [], r"parts is \[\], expected an object"),
        (["parts", "vit"], "here", r"parts.vit is 'here', expected an object"),
        (["parts", "vit", "fingerprint"], None, "parts.vit.fingerprint is missing, expected text"),
        (["parts", "decoder", "fingerprint"], 7, "parts.decoder.fingerprint is 7, expected text"),
        (["parts", "vit", "dtype"], None, "parts.vit.dtype is missing, expected text"),
        (["parts", "vit", "files"], None, "parts.vit.files is missing, expected an object"),
        (["parts", "vit", "files", "vit.onnx"], 5, "parts.vit.files.vit.onnx is 5, expected an object"),
        (["parts", "vit", "files", "vit.onnx", "bytes"], "5", "vit.onnx.bytes is '5', expected an integer"),
        (["parts", "vit", "files", "vit.onnx", "bytes"], True, "vit.onnx.bytes is True, expected an integer"),
        (["parts", "vit", "files", "vit.onnx", "sha256"], None, "vit.onnx.sha256 is missing, expected text"),
        (["parts", "sound"], {"fingerprint": "f", "files": {}}, "parts has 'sound', known are decoder, vit"),
    ],
)
def test_a_damaged_manifest_names_the_field(bundle: Path, keys: list[str], value: object, said: str) -> None:
    """None takes the field away."""
    manifest = owner = json.loads((bundle / MANIFEST).read_text())
    for key in keys[:-1]:
        owner = owner[key]
    if value is None:
        del owner[keys[-1]]
    else:
        owner[keys[-1]] = value
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    fingerprint = Checkpoint(bundle).fingerprint
    for use in (
        lambda: Bundle.open(bundle),
        lambda: check_same_source(bundle, "vit", fingerprint),
        lambda: add_part(bundle, "decoder", ["config.json"], fingerprint=fingerprint),
    ):
        with pytest.raises(BundleError, match=f"bundle.json: .*{said}"):
            use()


def test_a_manifest_that_is_not_json_is_named(bundle: Path) -> None:
    (bundle / MANIFEST).write_text('{"format_version": 1')
    with pytest.raises(BundleError, match="bundle.json is not valid JSON"):
        Bundle.open(bundle)
