"""What GPTQModel writes opens here, and what we write opens there. Needs the environment of `make test-gptqmodel`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_small_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantize.grid import Quantized
from quantize.job import quantize_checkpoint
from quantize.solver import Hessian, quantize_weight
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import QuantConfig
from qvl_edge.model.loading import QUANTIZED, load_decoder, read_projection

gptqmodel = pytest.importorskip("gptqmodel")
torch_linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
model = pytest.importorskip("gptqmodel.utils.model")
pytestmark = pytest.mark.interop

TOLERANCE = 2e-3  # relative: their layer computes in float16
CASES = [
    QuantConfig(group_size=64),
    QuantConfig(group_size=128, sym=False),
    QuantConfig(group_size=-1),
    QuantConfig(group_size=64, desc_act=True),
    QuantConfig(bits=8, group_size=64),
]


def settings_of(quant: QuantConfig, version: int) -> Any:
    form = {1: "gptq", 2: "gptq_v2"}[version]
    names = ("bits", "group_size", "sym", "desc_act")
    return gptqmodel.QuantizeConfig(format=form, **{name: getattr(quant, name) for name in names})


def their_layer(quant: QuantConfig, n_in: int, n_out: int, *, bias: bool) -> nn.Module:
    layer = torch_linear.TorchLinear(
        bits=quant.bits,
        group_size=quant.group_size,
        sym=quant.sym,
        desc_act=quant.desc_act,
        in_features=n_in,
        out_features=n_out,
        bias=bias,
        pack_dtype=torch.int32,
        register_buffers=True,
    )
    return layer.eval()


def their_pack(
    weight: Tensor, bias: Tensor | None, ours: Quantized, quant: QuantConfig, version: int
) -> dict[str, Tensor]:
    """The tensors that GPTQModel saves of a layer, with zero points as in version 1 or 2 of the format."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    theirs = their_layer(quant, weight.shape[1], weight.shape[0], bias=bias is not None)
    theirs.pack_original(linear, ours.scales.T.float(), ours.zeros.T.float(), ours.g_idx)
    if version == 1:
        model.convert_gptq_v2_to_v1_format_module(theirs, quantize_config=settings_of(quant, version))
    return {name: tensor.clone() for name, tensor in theirs.state_dict().items()}


def quantized(weight: Tensor, quant: QuantConfig) -> Quantized:
    generator = torch.Generator().manual_seed(3)
    hessian = Hessian(weight.shape[1])
    hessian.add(
        torch.randn(300, weight.shape[1], generator=generator) * torch.rand(weight.shape[1], generator=generator)
    )
    return quantize_weight(weight.float(), hessian.matrix(), quant)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("quant", CASES, ids=str)
def test_a_model_that_they_pack_holds_the_same_weights_here(quant: QuantConfig, version: int, tmp_path: Path) -> None:
    source = Checkpoint(write_small_checkpoint(tmp_path / "float"))
    tensors, expected = load_file(source.path / "model.safetensors"), {}
    for block in range(source.config.num_hidden_layers):
        for layer in QUANTIZED:
            name = f"transformer.h.{block}.{layer}"
            weight, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias", None)
            ours = quantized(weight, quant)
            expected[name] = ours.weight()
            packed = their_pack(ours.weight(), bias, ours, quant, version)
            assert ("bias" in packed) == (layer == "attn.c_attn")
            tensors |= {f"{name}.{part}": tensor for part, tensor in packed.items()}
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(tensors, folder / f"gptq_model-{quant.bits}bit-{quant.group_size}g.safetensors")
    settings_of(quant, version).save_pretrained(str(folder))
    settings = json.loads((folder / "quantize_config.json").read_text())
    assert (settings["lm_head"], "meta" in settings) == (False, True)
    section = json.loads((source.path / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(section))
    checkpoint = Checkpoint(folder)
    for name, weight in expected.items():
        assert torch.equal(read_projection(checkpoint, name), weight), name
    load_decoder(checkpoint, dtype=torch.float32)


def test_every_layer_of_a_written_bundle_computes_the_same_in_their_layer(tmp_path: Path) -> None:
    source = Checkpoint(write_small_checkpoint(tmp_path / "checkpoint"))
    quant = QuantConfig(group_size=64)
    quantize_checkpoint(source, tmp_path / "bundle", quant, None)
    checkpoint = Checkpoint(tmp_path / "bundle")
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(5))
    for layer in QUANTIZED:
        name = f"transformer.h.1.{layer}"
        tensors = {
            key.removeprefix(f"{name}."): checkpoint[key] for key in checkpoint.names if key.startswith(f"{name}.")
        }
        n_in, n_out = len(tensors["g_idx"]), tensors["scales"].shape[1]
        theirs = their_layer(quant, n_in, n_out, bias="bias" in tensors)
        theirs.load_state_dict(tensors, strict=True)
        model.convert_gptq_v1_to_v2_format_module(theirs, bits=quant.bits, pack_dtype=torch.int32)
        theirs.post_init()
        found = theirs(x[:, :n_in].half()).float()
        bias = tensors["bias"].float() if "bias" in tensors else 0
        expected = x[:, :n_in] @ read_projection(checkpoint, name).T + bias
        assert float((found - expected).norm() / expected.norm()) < TOLERANCE
