import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import write_small_checkpoint
from torch import Tensor

from benchmarks import layers
from benchmarks.layers import compare_layers
from kernels import dequantize_gptq
from quantize.blocks import causal_attention
from quantize.job import quantize_checkpoint
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import QuantConfig
from qvl_edge.errors import ConfigError
from qvl_edge.model.loading import QUANTIZED
from qvl_edge.text.conversations import Sample

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # relative: float32 there, float64 here
LENGTHS = (40, 23)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(write_small_checkpoint(tmp_path_factory.mktemp("exact") / "checkpoint", seq_length=16))


@pytest.fixture(scope="module")
def quantized(exact: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("bundle")
    quantize_checkpoint(exact, folder, QuantConfig(group_size=64, sym=False), None)
    return Checkpoint(folder)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Sample(ids, [], [], [], f"sample {number}") for number, ids in enumerate(drawn)]


def weights(checkpoint: Checkpoint, index: int) -> dict[str, Tensor]:
    """A block's tensors in float64, whatever they are on disk."""
    prefix = f"transformer.h.{index}."
    found = {}
    for layer in QUANTIZED:
        name = f"{prefix}{layer}"
        if checkpoint.config.quantization is None:
            found[layer] = checkpoint[f"{name}.weight"].double()
        else:
            parts = [checkpoint[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
            found[layer] = dequantize_gptq(*parts, bits=4, group_size=64).double()
    for name in ("ln_1.weight", "ln_2.weight", "attn.c_attn.bias"):
        found[name] = checkpoint[f"{prefix}{name}"].double()
    return found


def walk(checkpoint: Checkpoint, tensors: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The input of each projection, and the output (T, hidden) of the block, by the model's formula written out."""
    attend = causal_attention(checkpoint.config, len(x), "cpu")

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * tensors[f"{name}.weight"]

    first = norm(x, "ln_1")
    qkv = first @ tensors["attn.c_attn"].T + tensors["attn.c_attn.bias"]
    q, k, v = (part[None].float() for part in qkv.unflatten(-1, (3, 2, 64)).unbind(1))
    mixed = attend(q, k, v).flatten(2)[0].double()
    x = x + mixed @ tensors["attn.c_proj"].T
    second = norm(x, "ln_2")
    gated = second @ tensors["mlp.w1"].T * F.silu(second @ tensors["mlp.w2"].T)
    inputs = dict(zip(QUANTIZED, (first, mixed, second, second, gated), strict=True))
    return inputs, x + gated @ tensors["mlp.c_proj"].T


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).square().sum() / exact.square().sum())


def test_errors_are_those_of_the_formula_in_float64(
    exact: Checkpoint, quantized: Checkpoint, samples: list[Sample], tmp_path: Path
) -> None:
    rows = list(compare_layers(exact, quantized, samples, tmp_path))
    assert [row.block for row in rows] == [0, 1]
    right = [exact["transformer.wte.weight"][torch.tensor(sample.ids)].double() for sample in samples]
    own = right
    for row in rows:
        float_block, int4_block = weights(exact, row.block), weights(quantized, row.block)
        inputs = [walk(exact, float_block, x)[0] for x in right]
        for layer in QUANTIZED:
            x = torch.cat([one[layer] for one in inputs])
            bias = float_block.get(f"{layer}.bias", torch.zeros(()))  # stays as it is
            expected = relative(x @ int4_block[layer].T + bias, x @ float_block[layer].T + bias)
            assert row.projections[layer] == pytest.approx(expected, rel=TOLERANCE)
            assert expected > 1e-4  # there is something to see
        found = torch.cat([walk(exact, int4_block, x)[1] for x in right])
        own = [walk(exact, int4_block, x)[1] for x in own]
        right = [walk(exact, float_block, x)[1] for x in right]
        assert row.output == pytest.approx(relative(found, torch.cat(right)), rel=TOLERANCE)
        assert row.stream == pytest.approx(relative(torch.cat(own), torch.cat(right)), rel=TOLERANCE)
    assert rows[0].stream == rows[0].output and rows[1].stream > rows[1].output


def test_what_enters_the_blocks_leaves_two_files(
    exact: Checkpoint, quantized: Checkpoint, samples: list[Sample], tmp_path: Path
) -> None:
    for row in compare_layers(exact, quantized, samples, tmp_path):
        assert len(list(tmp_path.iterdir())) == 2, row


def test_two_other_models_are_refused(exact: Checkpoint, quantized: Checkpoint, tmp_path: Path) -> None:
    other = Checkpoint(write_small_checkpoint(tmp_path / "other", num_hidden_layers=1))
    for pair in ((quantized, exact), (exact, exact), (other, quantized)):
        with pytest.raises(ConfigError, match="not a float model and the same one quantized"):
            next(compare_layers(*pair, [], tmp_path))


def test_the_command_prints_and_writes_a_row_a_block(
    exact: Checkpoint,
    quantized: Checkpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, target = tmp_path / "data.txt", tmp_path / "layers.json"
    data.write_text("one line\nanother line\n")
    monkeypatch.setattr(sys, "argv", ["layers", str(exact.path), str(quantized.path), str(data), "--json", str(target)])
    layers.main()
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["block", *QUANTIZED, "output", "stream"]
    assert [row.split()[0] for row in rows] == ["0", "1"]
    content = json.loads(target.read_text())
    assert content["samples"] == 2 and [row["block"] for row in content["blocks"]] == [0, 1]
    assert rows[1].split()[-1] == f"{content['blocks'][1]['stream']:.2e}"
