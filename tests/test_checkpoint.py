"""Published checkpoints: every name accounted for, bad files named."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATA, write_small_checkpoint
from safetensors.torch import load_file, save_file

from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config
from qvl_edge.errors import CheckpointError
from qvl_edge.model.loading import check_tensors, expected_tensors, load_decoder, load_visual


@pytest.mark.parametrize(("name", "count"), [("Qwen-VL-Chat", 853), ("Qwen-VL-Chat-Int4", 1461)])
def test_every_published_tensor_has_its_place_and_shape(name: str, count: int) -> None:
    published = json.loads((DATA / "published" / name / "tensors.json").read_text())
    expected = expected_tensors(Config.from_folder(DATA / "published" / name))
    assert len(published) == count
    assert {key: list(shape) for key, shape in expected.items()} == published


def test_sharded_safetensors_and_bin_give_the_same_tensors(small_checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(small_checkpoint / "model.safetensors")
    names = sorted(tensors)
    for kind, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        folder = tmp_path / suffix
        folder.mkdir()
        (folder / "config.json").write_bytes((small_checkpoint / "config.json").read_bytes())
        weight_map = {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = f"{kind}-{number:05}-of-00002.{suffix}"
            held = {name: tensors[name] for name in part}
            save_file(held, folder / file) if suffix == "safetensors" else torch.save(held, folder / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / f"{kind}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        checkpoint = Checkpoint(folder)
        assert checkpoint.names == names
        assert all(torch.equal(checkpoint[name], tensors[name]) for name in names)
        assert checkpoint.fingerprint == Checkpoint(small_checkpoint).fingerprint
        load_decoder(checkpoint, dtype=torch.float32)


def test_the_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    prints = {Checkpoint(write_small_checkpoint(tmp_path / str(seed), seed=seed)).fingerprint for seed in (0, 1)}
    again = Checkpoint(write_small_checkpoint(tmp_path / "again", seed=1)).fingerprint
    assert len(prints) == 2 and again in prints


def test_a_missing_folder_or_missing_weights_say_what_was_expected(tmp_path: Path, small_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        Checkpoint(tmp_path / "nowhere")
    (small_checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights; expected \*\.safetensors"):
        Checkpoint(small_checkpoint)


def test_a_truncated_file_is_named_with_both_sizes(small_checkpoint: Path) -> None:
    file = small_checkpoint / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(small_checkpoint)
    message = str(caught.value)
    assert "model.safetensors" in message and str(len(whole) // 2) in message and str(len(whole)) in message


def test_missing_shards_are_counted_and_named(small_checkpoint: Path) -> None:
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (small_checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="lacks 2 of the 2 shards.*model-00001-of-00002"):
        Checkpoint(small_checkpoint)


def test_an_index_cannot_point_outside_the_folder(small_checkpoint: Path) -> None:
    (small_checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(CheckpointError, match="lacks 1"):
        Checkpoint(small_checkpoint)


def test_a_bin_file_with_code_in_it_is_refused_unrun(small_checkpoint: Path, tmp_path: Path) -> None:
    (small_checkpoint / "model.safetensors").unlink()
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (marker,))

    (small_checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Payload()}))
    with pytest.raises(CheckpointError, match="tensors only"):
        Checkpoint(small_checkpoint)
    assert not marker.exists()


def test_missing_unknown_and_misshapen_tensors_are_named(small_checkpoint: Path) -> None:
    file = small_checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["stranger"] = tensors.pop("transformer.ln_f.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        check_tensors(Checkpoint(small_checkpoint))
    for words in ("transformer.ln_f.weight", "stranger", "(511, 128)", "(512, 128)"):
        assert words in str(caught.value)


def test_buffers_that_training_tools_leave_behind_are_passed_over(small_checkpoint: Path) -> None:
    file = small_checkpoint / "model.safetensors"
    tensors = load_file(file) | {"transformer.rotary_emb.inv_freq": torch.ones(32)}
    save_file(tensors, file)
    load_decoder(Checkpoint(small_checkpoint), dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_modules_take_the_asked_dtype_and_do_not_keep_the_file_mapped(small_checkpoint: Path, dtype) -> None:
    checkpoint = Checkpoint(small_checkpoint)
    decoder, visual = load_decoder(checkpoint, dtype=dtype), load_visual(checkpoint, dtype=dtype)
    weights = [*decoder.parameters(), *visual.parameters()]
    assert {weight.dtype for weight in weights} == {dtype}
    before = decoder.lm_head.weight.clone()
    # overwrite the tensors in place: a mapped weight would change
    file = small_checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000:] = bytes(1000)
    with open(file, "r+b") as handle:
        handle.write(content)
    assert torch.equal(decoder.lm_head.weight, before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_released_tensor_leaves_no_pages_behind_and_can_be_read_again(kind: str, small_checkpoint: Path) -> None:
    tensors = load_file(small_checkpoint / "model.safetensors")
    name = "lm_head.weight"
    tensors[name] = torch.arange(16 << 20, dtype=torch.int32).view(torch.float16)
    if kind == "bin":
        (small_checkpoint / "model.safetensors").unlink()
        torch.save(tensors, small_checkpoint / "pytorch_model.bin")
    else:
        save_file(tensors, small_checkpoint / "model.safetensors")
    checkpoint = Checkpoint(small_checkpoint)
    before = _mapped_bytes()
    total = checkpoint[name].view(torch.int32).sum()
    assert _mapped_bytes() - before > 60e6  # of 67e6
    checkpoint.release(name)
    assert _mapped_bytes() - before < 1e6
    assert checkpoint[name].view(torch.int32).sum() == total


def _mapped_bytes() -> int:
    """File pages that this process has in memory."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssFile"))) * 1024
