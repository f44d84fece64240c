"""What we write opens in auto-gptq, and what it writes opens here. Needs the environment of `make test-interop`."""

from pathlib import Path

import pytest
import torch
from conftest import write_small_checkpoint
from torch import nn

from kernels import Int4Weight, dequantize_gptq, int4_gemm
from quantize.grid import Quantized
from quantize.job import quantize_checkpoint
from quantize.solver import Hessian, quantize_weight
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import QuantConfig
from qvl_edge.model.loading import GPTQ_TENSORS, QUANTIZED

# qlinear_cuda, for qlinear_cuda_old ignores g_idx; on a CPU it computes in torch
qlinear = pytest.importorskip("auto_gptq.nn_modules.qlinear.qlinear_cuda")
pytestmark = pytest.mark.interop

TOLERANCE = 1e-5  # relative: float32 sums of some hundred terms in another order
CASES = [
    QuantConfig(bits=4, group_size=64),
    QuantConfig(bits=4, group_size=128, sym=False),
    QuantConfig(bits=4, group_size=-1),
    QuantConfig(bits=4, group_size=64, desc_act=True),
    QuantConfig(bits=4, group_size=64, desc_act=True, static_groups=True, sym=False),
    QuantConfig(bits=8, group_size=64),
]


def their_layer(quant: QuantConfig, n_in: int, n_out: int) -> nn.Module:
    return qlinear.QuantLinear(quant.bits, quant.group_size, n_in, n_out, True, weight_dtype=torch.float32)


def quantized(quant: QuantConfig) -> tuple[Quantized, torch.Tensor, torch.Tensor]:
    """A projection of 256 inputs and 96 outputs quantized by us, its bias, and some of its inputs."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, 256, generator=generator) * torch.rand(256, generator=generator)  # so that desc_act reorders
    hessian = Hessian(256)
    hessian.add(x)
    weight, bias = torch.randn(96, 256, generator=generator), torch.randn(96, generator=generator)
    return quantize_weight(weight, hessian.matrix(), quant), bias, x


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < TOLERANCE


@pytest.mark.parametrize("quant", CASES, ids=str)
def test_our_packed_layers_compute_the_same_in_their_quantlinear(quant: QuantConfig) -> None:
    ours, bias, x = quantized(quant)
    theirs = their_layer(quant, 256, 96)
    tensors = ours.packed(quant)
    assert {name: (t.shape, t.dtype) for name, t in tensors.items() if name != "scales"} == {
        name: (t.shape, t.dtype) for name, t in theirs.state_dict().items() if name not in ("scales", "bias")
    }
    theirs.load_state_dict(tensors | {"bias": bias}, strict=True)
    assert_same(theirs(x), x @ ours.weight().T + bias)
    weight = dequantize_gptq(
        *(tensors[name] for name in GPTQ_TENSORS[:4]), bits=quant.bits, group_size=quant.group_size
    )
    assert torch.equal(weight, ours.weight())


@pytest.mark.parametrize("quant", [case for case in CASES if case.bits == 4], ids=str)
def test_layers_that_they_pack_compute_the_same_here(quant: QuantConfig) -> None:
    ours, bias, x = quantized(quant)
    linear = nn.Linear(256, 96)
    with torch.no_grad():
        linear.weight.copy_(ours.weight())
        linear.bias.copy_(bias)
    theirs = their_layer(quant, 256, 96)
    theirs.pack(linear, ours.scales.T.float(), ours.zeros.T.float(), ours.g_idx)
    for name, tensor in ours.packed(quant).items():
        assert torch.equal(getattr(theirs, name).to(tensor.dtype), tensor), name  # the same words, to the bit
    weight = Int4Weight.from_gptq(
        theirs.qweight, theirs.qzeros, theirs.scales, theirs.g_idx.int(), group_size=quant.group_size
    )
    assert_same(int4_gemm(x, weight, theirs.bias.float()), theirs(x).float())


def test_every_layer_of_a_written_bundle_opens_in_their_quantlinear(tmp_path: Path) -> None:
    source = Checkpoint(write_small_checkpoint(tmp_path / "checkpoint"))
    quantize_checkpoint(source, tmp_path / "bundle", QuantConfig(group_size=64), None)
    checkpoint = Checkpoint(tmp_path / "bundle")
    quant = checkpoint.config.quantization
    assert quant is not None
    generator = torch.Generator().manual_seed(5)
    for block in range(checkpoint.config.num_hidden_layers):
        for layer in QUANTIZED:
            name = f"transformer.h.{block}.{layer}"
            tensors = {part: checkpoint[f"{name}.{part}"] for part in GPTQ_TENSORS}
            n_in, n_out = len(tensors["g_idx"]), len(tensors["bias"])
            theirs = their_layer(quant, n_in, n_out)
            theirs.load_state_dict(tensors, strict=True)
            weight = Int4Weight.from_gptq(
                *(tensors[part] for part in GPTQ_TENSORS[:4]), group_size=quant.group_size, name=name
            )
            x = torch.randn(5, n_in, generator=generator)
            assert_same(int4_gemm(x, weight, tensors["bias"].float()), theirs(x).float())
