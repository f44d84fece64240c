"""Published checkpoints: every name accounted for, bad files named."""

import json
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DATA, write_small_checkpoint
from safetensors.torch import load_file, save_file

from export.part import export_vit
from quantize.job import quantize_checkpoint
from qvl_edge import Runtime
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config, QuantConfig
from qvl_edge.errors import CheckpointError, ConfigError
from qvl_edge.model.loading import check_tensors, expected_tensors, load_decoder, load_visual
from qvl_edge.text.tokenizer import Tokenizer


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


def test_the_fingerprint_knows_every_byte(small_checkpoint: Path) -> None:
    before = Checkpoint(small_checkpoint).fingerprint
    file = small_checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert Checkpoint(small_checkpoint).fingerprint != before


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
    (small_checkpoint / "model.safetensors").unlink()
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (small_checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="lacks 2 of the 2 shards.*model-00001-of-00002"):
        Checkpoint(small_checkpoint)


def test_an_index_cannot_point_outside_the_folder(small_checkpoint: Path) -> None:
    (small_checkpoint / "model.safetensors").rename(small_checkpoint.parent / "model.safetensors")
    (small_checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(CheckpointError, match="lacks 1"):
        Checkpoint(small_checkpoint)


def shards(folder: Path, count: int = 2, *, of: int = 2) -> dict[str, str]:
    """The first `count` of `of` shards of the model in `folder`; returns the weight map of all."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {}
    for number in range(of):
        part = {name: tensors[name] for name in sorted(tensors)[number::of]}
        file = f"model-{number + 1:05}-of-{of:05}.safetensors"
        weight_map |= dict.fromkeys(part, file)
        if number < count:
            save_file(part, folder / file)
    return weight_map


def index(folder: Path, weight_map: dict[str, str], name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


def only_shards(folder: Path) -> None:
    index(folder, shards(folder))
    save_file({"transformer.ln_f.weight": torch.zeros(128)}, folder / "model.safetensors")


def bins_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    index(folder, {"a": "model-00001-of-00002.safetensors"})


def family_only(folder: Path) -> None:
    shards(folder)
    (folder / "model.safetensors").unlink()
    index(folder, {"a": "model-00001-of-00003.safetensors"})


def pointers_beside_bins(folder: Path) -> None:
    bins_only(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").write_text(POINTER)


LORA = {"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 1988345320\n"
LEFTOVERS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "stale index": (
        lambda f: index(f, {"a": "model-00001-of-00010.safetensors"}),
        "model.safetensors",
        "model.safetensors.index.json",
    ),
    "stale index of .bin": (
        lambda f: index(f, {"a": "pytorch_model-00001-of-00010.bin"}, "pytorch_model.bin.index.json"),
        "model.safetensors",
        "pytorch_model.bin.index.json",
    ),
    "adapter": (
        lambda f: save_file(LORA, f / "adapter_model.safetensors"),
        "model.safetensors",
        "adapter_model.safetensors",
    ),
    "adapter as .bin": (lambda f: torch.save(LORA, f / "adapter_model.bin"), "model.safetensors", "adapter_model.bin"),
    "old shard": (lambda f: shards(f, 1) and None, "model.safetensors", "model-00001-of-00002.safetensors"),
    "whole index and a rest": (only_shards, "model.safetensors.index.json", "model.safetensors"),
    "stale index and .bin": (bins_only, "pytorch_model.bin", "model.safetensors.index.json"),
    "stale index and shards": (family_only, "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
    "LFS pointer and .bin": (pointers_beside_bins, "pytorch_model.bin", "model.safetensors"),
}


@pytest.mark.parametrize("case", LEFTOVERS)
def test_leftovers_beside_a_whole_model_are_passed_over_and_named(case: str, small_checkpoint: Path) -> None:
    before = Checkpoint(small_checkpoint)
    leave, source, unread = LEFTOVERS[case]
    leave(small_checkpoint)
    with pytest.warns(UserWarning, match=rf"is read from {re.escape(source)}; ignored are {re.escape(unread)}"):
        after = Checkpoint(small_checkpoint)
    assert after.names == before.names and after.fingerprint == before.fingerprint


def test_shards_without_an_index_are_all_there_or_named(small_checkpoint: Path) -> None:
    names = Checkpoint(small_checkpoint).names
    shards(small_checkpoint, 3, of=3)
    (small_checkpoint / "model.safetensors").unlink()
    assert Checkpoint(small_checkpoint).names == names
    (small_checkpoint / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of the 3 shards: model-00002-of-00003.safetensors"):
        Checkpoint(small_checkpoint)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "gptq_model-4bit-128g.bin"])
def test_a_git_lfs_pointer_says_how_to_fetch_the_file(file: str, small_checkpoint: Path) -> None:
    (small_checkpoint / "model.safetensors").unlink()
    (small_checkpoint / file).write_text(POINTER)
    said = rf"is a Git LFS pointer.*\n  git -C {small_checkpoint} lfs pull"
    with pytest.raises(CheckpointError, match=f"{file} {said}"):
        Checkpoint(small_checkpoint)
    for name in ("generation_config.json", "config.json"):
        (small_checkpoint / name).write_text(POINTER)
        with pytest.raises(ConfigError, match=f"{name} {said}"):
            Checkpoint(small_checkpoint)
    (small_checkpoint / "qwen.tiktoken").write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"qwen.tiktoken {said}"):
        Tokenizer.from_file(small_checkpoint / "qwen.tiktoken")


@pytest.mark.parametrize(
    ("there", "put"),
    [
        *((r"^", p) for p in ("module.", "_orig_mod.module.", "base_model.model.", "model.", "_forward_module.")),
        (r"^transformer\.", "_fsdp_wrapped_module.transformer._fsdp_wrapped_module."),
        (r"(?<=\.h\.\d\.)", "_checkpoint_wrapped_module."),
    ],
)
def test_what_training_tools_add_to_names_is_taken_out(there: str, put: str, small_checkpoint: Path) -> None:
    before = Checkpoint(small_checkpoint)
    file = small_checkpoint / "model.safetensors"
    save_file({re.sub(there, put, name): tensor for name, tensor in load_file(file).items()}, file)
    after = Checkpoint(small_checkpoint)
    check_tensors(after)
    assert after.fingerprint == before.fingerprint
    after.release("lm_head.weight")
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_tensors_under_a_key_of_a_training_tool_are_found_and_other_objects_named(small_checkpoint: Path) -> None:
    before, tensors = Checkpoint(small_checkpoint), load_file(small_checkpoint / "model.safetensors")
    (small_checkpoint / "model.safetensors").unlink()
    torch.save({"state_dict": tensors, "epoch": 3}, small_checkpoint / "pytorch_model.bin")
    assert Checkpoint(small_checkpoint).fingerprint == before.fingerprint
    torch.save({**tensors, "epoch": 3}, small_checkpoint / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match="pytorch_model.bin holds 'epoch' of type int, expected nothing but tensors"
    ):
        Checkpoint(small_checkpoint)


def test_an_adapter_given_as_the_model_names_its_base_and_lora(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen-VL-Chat"}))
    save_file(LORA, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"is an adapter.*\n  Qwen/Qwen-VL-Chat --lora {tmp_path}"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"<html>404</html>", b"PK\x03\x04rest"])
def test_a_damaged_bin_file_is_named_without_advice_to_load_it_unsafely(content: bytes, small_checkpoint: Path) -> None:
    (small_checkpoint / "model.safetensors").unlink()
    (small_checkpoint / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match="pytorch_model.bin cannot be loaded as tensors only") as caught:
        Checkpoint(small_checkpoint)
    assert "weights_only" not in str(caught.value)


def test_a_bin_file_with_code_in_it_is_refused_unrun(small_checkpoint: Path, tmp_path: Path) -> None:
    (small_checkpoint / "model.safetensors").unlink()
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (marker,))

    (small_checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Payload()}))
    with pytest.raises(CheckpointError, match="tensors only") as caught:
        Checkpoint(small_checkpoint)
    assert not marker.exists() and "weights_only" not in str(caught.value)


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


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("transformer.h.0.mlp.w1.weight", torch.zeros(0), "ZeRO-3.*zero_to_fp32.py"),
        ("transformer.h.0.mlp.w1.lora_A.weight", torch.zeros(4, 128), "an adapter in it.*merge_and_unload"),
    ],
)
def test_what_a_training_tool_left_undone_is_named(
    name: str, tensor: torch.Tensor, words: str, small_checkpoint: Path
) -> None:
    file = small_checkpoint / "model.safetensors"
    save_file(load_file(file) | {name: tensor}, file)
    with pytest.raises(CheckpointError, match=f"{name}.*{words}"):
        check_tensors(Checkpoint(small_checkpoint))


@pytest.mark.parametrize("quantized", [True, False])
def test_settings_of_quantization_that_the_weights_contradict_are_named(
    quantized: bool, small_checkpoint: Path
) -> None:
    if quantized:
        file = small_checkpoint / "model.safetensors"
        save_file(load_file(file) | {"transformer.h.0.mlp.w1.qweight": torch.zeros(16, 256, dtype=torch.int32)}, file)
    else:
        (small_checkpoint / "quantize_config.json").write_text('{"bits": 4, "group_size": 64}')
    words = "no quantize_config.json says how" if quantized else "its weights are float.*remove quantize_config.json"
    with pytest.raises(CheckpointError, match=words):
        check_tensors(Checkpoint(small_checkpoint))


def test_a_head_that_cannot_be_int8_is_named(small_checkpoint: Path) -> None:
    file = small_checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][7, 3] = torch.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="lm_head.weight, row 7 of 512 holds NaN"):
        load_decoder(Checkpoint(small_checkpoint), dtype=torch.float32, head="int8")


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


@pytest.mark.parametrize("half", ["transformer.visual.ln_post.weight", "transformer.h.1.mlp.w1.weight"])
def test_both_halves_are_checked_before_either_is_worked_on(half: str, small_checkpoint: Path, tmp_path: Path) -> None:
    file = small_checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors[half]
    save_file(tensors, file)
    checkpoint, out = Checkpoint(small_checkpoint), tmp_path / "out"
    for work in (
        lambda: quantize_checkpoint(checkpoint, out, QuantConfig(), None),
        lambda: export_vit(checkpoint, out),
        lambda: Runtime.from_pretrained(small_checkpoint, device="cpu", cache_dir=out),
    ):
        with pytest.raises(CheckpointError, match=f"lacks 1 tensors, such as {half}"):
            work()
    assert not out.exists()
