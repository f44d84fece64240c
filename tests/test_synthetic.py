"""The synthetic checkpoint: published names, shapes and bytes, and weights that keep activations in range."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA, SMALL

from benchmarks.synthetic import Values, layout_of, main, split_layout, write_synthetic, write_vocabulary
from quantize.repack import repack_checkpoint
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config
from qvl_edge.errors import BundleError, CheckpointError
from qvl_edge.files import layout_bytes
from qvl_edge.model.cache import KVCache
from qvl_edge.model.loading import check_tensors, load_decoder, load_visual
from qvl_edge.published import CONFIG, QUANTIZATION
from qvl_edge.text.tokenizer import IMG, Tokenizer

RANKS = 300
TINY = SMALL | {
    "torch_dtype": "bfloat16",
    "vocab_size": 640,
    "visual": SMALL["visual"] | {"image_start_id": RANKS + 214},
}


def write(folder: Path, *, int4: bool = False, seed: int = 0, **changes: Any) -> Checkpoint:
    settings = copy.deepcopy(TINY) | changes
    write_synthetic(folder, settings, int4=int4, seed=seed)
    return Checkpoint(folder)


@pytest.mark.parametrize(("name", "total"), [("Qwen-VL-Chat", 19_313_870_336), ("Qwen-VL-Chat-Int4", 9_731_786_240)])
def test_at_full_size_it_has_the_published_tensors_and_bytes(name: str, total: int) -> None:
    """9,731,786,240 is total_size of the published Int4 index; a float one is two bytes a parameter."""
    layout = layout_of(Config.from_dict(CONFIG, QUANTIZATION if name.endswith("Int4") else None))
    published = json.loads((DATA / "published" / name / "tensors.json").read_text())
    assert {key: list(shape) for key, (_, shape) in layout.items()} == published
    assert layout_bytes(layout) == total
    shards = split_layout(layout)
    assert [key for shard in shards for key in shard] == list(layout)
    assert max(layout_bytes(shard) for shard in shards) <= 2_000_000_000


@pytest.mark.parametrize("int4", [False, True])
def test_files_hold_what_a_published_checkpoint_does(int4: bool, tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "made", int4=int4)
    check_tensors(checkpoint)
    dtypes = {checkpoint[name].dtype for name in checkpoint.names}
    assert dtypes == ({torch.float16, torch.int32} if int4 else {torch.bfloat16})
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(checkpoint[name].nbytes for name in checkpoint.names)
    assert set(index["weight_map"]) == set(checkpoint.names)
    assert (checkpoint.config.quantization is not None) == int4
    assert checkpoint.generation["chat_format"] == "chatml"
    assert not list(tmp_path.glob("*.partial"))


def test_the_int4_one_passes_for_gptq_with_zero_8(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "made", int4=True)
    assert repack_checkpoint(checkpoint, tmp_path / "bundle")
    name = "transformer.h.0.attn.c_proj"
    assert checkpoint[f"{name}.g_idx"].tolist() == [0] * 128
    assert set(checkpoint[f"{name}.qzeros"].flatten().tolist()) == {0x77777777}
    assert not checkpoint[f"{name}.bias"].any()
    assert checkpoint["transformer.h.0.attn.c_attn.bias"].any()


@torch.inference_mode()
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.slow
def test_activations_keep_a_sane_size_through_32_and_48_layers_in_float16(int4: bool, tmp_path: Path) -> None:
    visual = TINY["visual"] | {"layers": 48}
    checkpoint = write(tmp_path / "made", int4=int4, num_hidden_layers=32, visual=visual)
    config = checkpoint.config
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0)).half()
    features = load_visual(checkpoint, dtype=torch.float16)(pixels)
    decoder = load_decoder(checkpoint, dtype=torch.float16)
    ids = torch.randint(0, 512, (1, 64), generator=torch.Generator().manual_seed(0))
    embeds = torch.cat((decoder.embed(ids), features), dim=1)
    largest = 0.0

    def look(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, float(output.abs().max()))

    for module in decoder.modules():
        module.register_forward_hook(look)
    logits = decoder(embeds, KVCache(config, 1, embeds.shape[1], dtype=torch.float16))
    assert 0.3 < float(features.float().std()) < 10
    assert 0.3 < float(logits.std()) < 10
    assert largest < 1000  # of 65,504


def test_some_channels_of_the_residual_are_much_larger(tmp_path: Path) -> None:
    visual = TINY["visual"] | {"output_dim": 1024}
    checkpoint = write(tmp_path / "made", hidden_size=1024, num_attention_heads=16, visual=visual)
    read, written = (
        checkpoint["transformer.wte.weight"].float(),
        checkpoint["transformer.h.1.mlp.c_proj.weight"].float(),
    )
    large = [
        (energy > 16 * energy.median()).nonzero()[:, 0].tolist()
        for energy in (read.square().mean(0), written.square().mean(1))
    ]
    assert large[0] == large[1]
    assert len(large[0]) == 2  # one of 512


def test_no_two_tensors_and_no_two_pieces_of_one_are_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.synthetic._PIECE", 1024)
    checkpoint = write(tmp_path / "made")
    matrices = [name for name in checkpoint.names if checkpoint[name].ndim == 2]
    starts = {}
    for name in matrices:
        for first in range(0, len(checkpoint[name]), max(1, 1024 // checkpoint.shape(name)[1])):
            row = checkpoint[name][first].float()
            starts.setdefault(tuple((row.abs() / row.abs().max()).tolist()), []).append((name, first))
    assert all(len(places) == 1 for places in starts.values())
    assert len(starts) > 500


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    first, again, other = (write(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    for file in first.path.iterdir():
        assert file.read_bytes() == (again.path / file.name).read_bytes()


def test_special_ids_are_the_published_ones(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "qwen.tiktoken", 151_643)
    tokenizer = Tokenizer.from_file(tmp_path / "qwen.tiktoken")
    assert tokenizer.specials["<|endoftext|>"] == 151_643
    assert tokenizer.specials[IMG] == CONFIG["visual"]["image_start_id"]
    ids = tokenizer.encode("Where is the red car? 红色的车在哪里？")
    assert max(ids) < 4096
    assert tokenizer.decode(ids) == "Where is the red car? 红色的车在哪里？"


def test_a_given_tokenizer_is_taken_if_it_has_the_right_size(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "right", RANKS)
    write_vocabulary(tmp_path / "wrong", RANKS + 1)

    def made(vocabulary: str) -> None:
        write_synthetic(tmp_path / "made", TINY, int4=False, tokenizer=tmp_path / vocabulary)

    with pytest.raises(CheckpointError, match="wrong has 301 ranks, image_start_id needs 300"):
        made("wrong")
    made("right")
    assert (tmp_path / "made" / "qwen.tiktoken").read_bytes() == (tmp_path / "right").read_bytes()


def test_a_stopped_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(self: Values, name: str, *of: Any) -> Iterator[torch.Tensor]:
        yield from real(self, name, *of)
        if name == "transformer.ln_f.weight":
            raise KeyboardInterrupt

    real = Values.pieces
    monkeypatch.setattr(Values, "pieces", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic(tmp_path / "made", TINY, int4=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_and_a_small_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made").mkdir()
    with pytest.raises(SystemExit, match="already exists"):
        main([str(tmp_path / "made")])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(BundleError, match=r"needs \d+\.\d MB and its disk has 1\.0 MB free"):
        write(tmp_path / "other")
    assert not (tmp_path / "other").exists()
