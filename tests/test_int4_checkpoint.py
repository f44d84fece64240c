"""Int4 checkpoints as AutoGPTQ's last version and GPTQModel lay them out: the same model, whoever wrote it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_small_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels import pack_zeros, unpack_zeros
from quantize.job import quantize_checkpoint
from quantize.repack import repack_checkpoint
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import QuantConfig
from qvl_edge.errors import CheckpointError
from qvl_edge.model.cache import KVCache
from qvl_edge.model.loading import load_decoder, load_fused

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module", params=[4, 8])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the published layout, with a bias of zeros in every layer that has none."""
    folder = tmp_path_factory.mktemp("int4")
    source = write_small_checkpoint(folder / "float")
    quantize_checkpoint(Checkpoint(source), folder / "bundle", QuantConfig(bits=request.param, group_size=32), None)
    model = folder / "published"
    model.mkdir()
    tensors = {
        name: tensor for file in (folder / "bundle").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    visual = {name: tensor for name, tensor in load_file(source / "model.safetensors").items() if ".visual." in name}
    save_file(tensors | visual, model / "model.safetensors")
    for name in ("config.json", "qwen.tiktoken", "generation_config.json", "quantize_config.json"):
        (model / name).write_bytes((folder / "bundle" / name).read_bytes())
    return model


def without_zero_biases(tensors: Tensors, settings: dict[str, Any]) -> None:
    for name in list(tensors):
        if ".h." in name and name.endswith(".bias") and "c_attn" not in name:
            assert not tensors.pop(name).any()


def as_gptqmodel(tensors: Tensors, settings: dict[str, Any]) -> None:
    without_zero_biases(tensors, settings)
    settings |= {"lm_head": False, "pack_dtype": "int32", "checkpoint_format": "gptq_v2"}
    settings |= {"meta": {"quantizer": ["gptqmodel:7.6.0"]}}
    for name in tensors:
        if name.endswith("g_idx"):
            tensors[name] = tensors[name].long()
        if name.endswith("qzeros"):
            tensors[name] = pack_zeros(unpack_zeros(tensors[name], settings["bits"]), settings["bits"], "gptq_v2")


def rewrite(published: Path, folder: Path, change: Callable[[Tensors, dict[str, Any]], None], file: str) -> Path:
    folder.mkdir()
    tensors = load_file(published / "model.safetensors")
    settings = json.loads((published / "quantize_config.json").read_text())
    change(tensors, settings)
    for name in ("qwen.tiktoken", "generation_config.json"):
        (folder / name).write_bytes((published / name).read_bytes())
    section = json.loads((published / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(section))
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / file) if file.endswith("safetensors") else torch.save(tensors, folder / file)
    return folder


def logits(checkpoint: Checkpoint, *, fused: bool = False) -> Tensor:
    cpu = torch.device("cpu")
    ids = torch.tensor([[5, 80, 13, 200]])
    if fused:
        decoder: Any = load_fused(checkpoint, dtype=torch.float16, device=cpu, backend="torch")
    else:
        decoder = load_decoder(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        return decoder(decoder.embed(ids), KVCache(checkpoint.config, 1, 8, dtype=decoder.dtype))


def test_int8_activations_change_the_logits_a_little(published: Path) -> None:
    checkpoint, token = Checkpoint(published), torch.arange(12)[None]
    found = []
    for activations in ("float", "int8"):
        decoder = load_decoder(checkpoint, dtype=torch.float32, head="int8", activations=activations)
        cache = KVCache(checkpoint.config, 1, 16, dtype=torch.float32)
        with torch.inference_mode():
            found.append(decoder(decoder.embed(token), cache, all_logits=True))
    exact, rounded = found
    assert 1e-4 < float((rounded - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize(
    "file",
    ["model.safetensors", "gptq_model-4bit-128g.safetensors", "gptq_model-4bit-128g.bin", "gptq_model-4bit-128g.pt"],
)
@pytest.mark.parametrize("change", [without_zero_biases, as_gptqmodel])
def test_an_absent_bias_is_zero_wherever_the_checkpoint_is_read(
    published: Path, tmp_path: Path, change: Callable[[Tensors, dict[str, Any]], None], file: str
) -> None:
    before, after = Checkpoint(published), Checkpoint(rewrite(published, tmp_path / "other", change, file))
    repack_checkpoint(after, tmp_path / "bundle")
    bundle = Checkpoint(tmp_path / "bundle")
    assert bundle.names == [name for name in after.names if ".visual." not in name]
    expected = logits(before)
    assert torch.equal(logits(after), expected)
    assert torch.equal(logits(bundle), expected)
    if before.config.quantization.bits == 4:
        assert torch.equal(logits(after, fused=True), logits(before, fused=True))


def test_a_bias_that_the_float_model_has_may_not_be_absent(published: Path, tmp_path: Path) -> None:
    name = "transformer.h.1.attn.c_attn.bias"
    found = rewrite(published, tmp_path / "other", lambda tensors, _: tensors.pop(name), "model.safetensors")
    for load in (lambda: logits(Checkpoint(found)), lambda: repack_checkpoint(Checkpoint(found), tmp_path / "bundle")):
        with pytest.raises(CheckpointError, match=f"lacks 1 tensors, such as {name}"):
            load()


def test_a_bias_that_a_layer_has_on_disk_is_added_whatever_config_json_says(published: Path, tmp_path: Path) -> None:
    name = "transformer.h.1.mlp.c_proj.bias"

    def change(tensors: Tensors, settings: dict[str, Any]) -> None:
        tensors[name] = torch.ones_like(tensors[name])

    found = Checkpoint(rewrite(published, tmp_path / "other", change, "model.safetensors"))
    assert not torch.allclose(logits(found), logits(Checkpoint(published)))


def test_activations_in_int8_reach_every_packed_product(published: Path) -> None:
    checkpoint = Checkpoint(published)
    quant = checkpoint.config.quantization
    assert quant is not None
    ids = torch.tensor([[5, 80, 13, 200]])
    found = []
    with torch.inference_mode():
        for head in ("float16", "int8"):
            for activations in ("float", "int8"):
                model = load_decoder(checkpoint, dtype=torch.float32, head=head, activations=activations)
                found.append(model(model.embed(ids), KVCache(model.config, 1, 8, dtype=torch.float32)))
    for exact, rounded in (found[:2], found[2:]):
        off = float((exact - rounded).norm() / exact.norm())
        packed = quant.bits == 4 or exact is found[2]  # 8 bits are dequantized, an int8 head is not
        assert (1e-4 < off < 0.1) if packed else off == 0
