import json
from pathlib import Path

import pytest
import torch
from conftest import write_small_checkpoint
from safetensors.torch import load_file, save_file

from kernels import pack_zeros, unpack_zeros
from quantize import gptq
from quantize.job import quantize_checkpoint
from quantize.repack import repack_checkpoint
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import QuantConfig
from qvl_edge.errors import CheckpointError
from qvl_edge.model.loading import load_decoder, read_projection

pytestmark = pytest.mark.slow

LAYER = "transformer.h.1.mlp.w1"


@pytest.fixture(scope="module")
def float_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("float") / "checkpoint")


@pytest.fixture
def int4_checkpoint(float_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint as published: one file with int4 decoder and float vision tower, settings in config.json only."""
    made = tmp_path / "made"
    quant = QuantConfig(group_size=32, sym=False)
    quantize_checkpoint(Checkpoint(float_checkpoint), made, quant, None)
    tensors = {name: tensor for shard in made.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    source = load_file(float_checkpoint / "model.safetensors")
    tensors |= {name: tensor for name, tensor in source.items() if ".visual." in name}
    folder = tmp_path / "int4"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    for name in ("config.json", "qwen.tiktoken", "generation_config.json"):
        (folder / name).write_bytes((made / name).read_bytes())
    return folder


def change(folder: Path, name: str, tensor: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensor}, folder / "model.safetensors")


def test_an_int4_checkpoint_is_copied_bit_by_bit(
    int4_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gptq.main([str(int4_checkpoint), str(tmp_path / "bundle")]) == 0
    source, made = Checkpoint(int4_checkpoint), Checkpoint(tmp_path / "bundle")
    assert made.names == [name for name in source.names if ".visual." not in name]
    for name in made.names:
        assert made[name].dtype == source[name].dtype
        assert torch.equal(made[name], source[name])
    load_decoder(made, dtype=torch.float32)
    assert made.config.quantization == source.config.quantization
    entry = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["parts"]["decoder"]
    assert (entry["method"], entry["fingerprint"]) == ("copy", source.fingerprint)
    capsys.readouterr()
    assert gptq.main([str(int4_checkpoint), str(tmp_path / "bundle")]) == 0
    assert "already done" in capsys.readouterr().out


def test_v1_and_v2_zeros_give_the_same_weights(int4_checkpoint: Path, tmp_path: Path) -> None:
    repack_checkpoint(Checkpoint(int4_checkpoint), tmp_path / "v1")
    tensors = load_file(int4_checkpoint / "model.safetensors")
    for name in [name for name in tensors if name.endswith("qzeros")]:
        tensors[name] = pack_zeros(unpack_zeros(tensors[name], 4, "gptq"), 4, "gptq_v2")
    save_file(tensors, int4_checkpoint / "model.safetensors")
    section = json.loads((int4_checkpoint / "config.json").read_text())
    section["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (int4_checkpoint / "config.json").write_text(json.dumps(section))
    repack_checkpoint(Checkpoint(int4_checkpoint), tmp_path / "v2")
    v1, v2 = Checkpoint(tmp_path / "v1"), Checkpoint(tmp_path / "v2")
    assert v2.config.quantization is not None
    assert v2.config.quantization.checkpoint_format == "gptq_v2"
    assert not torch.equal(v1[f"{LAYER}.qzeros"], v2[f"{LAYER}.qzeros"])
    assert torch.equal(read_projection(v1, LAYER), read_projection(v2, LAYER))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("g_idx", torch.full((128,), 4, dtype=torch.int32), r"g_idx lies in \[4, 4\], expected \[0, 3\]"),
        ("g_idx", -torch.ones(128, dtype=torch.int32), r"g_idx lies in \[-1, -1\]"),
        ("g_idx", torch.zeros(128, dtype=torch.int32), r"g_idx puts 0 to 128 channels into a group, expected 32"),
        ("scales", torch.full((4, 256), torch.nan, dtype=torch.float16), r"scales holds NaN"),
        ("qweight", torch.zeros(8, 256, dtype=torch.int32), r"qweight has shape \(8, 256\)"),
        ("qweight", torch.zeros(16, 256, dtype=torch.int64), r"qweight is torch.int64"),
    ],
)
def test_a_damaged_layer_is_named_and_nothing_is_published(
    part: str, value: torch.Tensor, message: str, int4_checkpoint: Path, tmp_path: Path
) -> None:
    change(int4_checkpoint, f"{LAYER}.{part}", value)
    with pytest.raises(CheckpointError, match=rf"transformer\.h\.1\.mlp\.w1.*{message}"):
        repack_checkpoint(Checkpoint(int4_checkpoint), tmp_path / "bundle")
    assert not (tmp_path / "bundle" / "bundle.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "8"], "quantized already with bits 4, and 8 was asked for"),
        (["--sym"], "quantized already with sym False, and True was asked for"),
        (["--calibration", "data.json"], "leave --calibration"),
        (["--round-to-nearest"], "leave --calibration and --round-to-nearest out"),
    ],
)
def test_options_that_ask_for_another_quantization_are_refused(
    options: list[str], message: str, int4_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gptq.main([str(int4_checkpoint), str(tmp_path / "bundle"), *options]) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_stopped_copy_goes_on_to_the_same_bytes(int4_checkpoint: Path, tmp_path: Path) -> None:
    class Stop(BaseException):
        pass

    def stop(event: object) -> None:
        raise Stop

    source = Checkpoint(int4_checkpoint)
    with pytest.raises(Stop):
        repack_checkpoint(source, tmp_path / "stopped", progress=stop)
    assert repack_checkpoint(source, tmp_path / "stopped")
    assert repack_checkpoint(source, tmp_path / "straight")
    names = sorted(path.name for path in (tmp_path / "straight").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "stopped").iterdir())
    for name in names:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
