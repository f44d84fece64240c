"""Putting the exported tower into a bundle: what is refused, and that a failed or stopped export leaves nothing."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_vit import GOLDEN
from torch import Tensor

from export import part
from export.graph import VisualWeights
from export.part import export_vit
from export.vit import main
from qvl_edge.bundle import VIT, VIT_DATA, add_part
from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.config import Config
from qvl_edge.errors import BundleError, CheckpointError, ConfigError, ParityError
from qvl_edge.model.loading import expected_tensors

pytestmark = pytest.mark.slow

DTYPES = ("float32", "float16", "int8", "int4")


class Changed:
    """A checkpoint's tensors, one of them changed."""

    def __init__(self, checkpoint: Checkpoint, name: str, change: Callable[[Tensor], Tensor]):
        self.checkpoint, self.name, self.change = checkpoint, VISUAL + name, change
        self.release = checkpoint.release

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.checkpoint[name]
        return self.change(tensor) if name == self.name else tensor


@contextmanager
def changed(name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Graphs are built with this tensor changed; what they are compared with is the checkpoint all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            part, "VisualWeights", lambda source, visual: VisualWeights(Changed(source, name, change), visual)
        )
        yield


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return Checkpoint(GOLDEN / "tiny-a" / "checkpoint")


@pytest.fixture(scope="module")
def long() -> Checkpoint:
    """The quick one: one block and 256 patches."""
    return Checkpoint(GOLDEN / "tiny-long" / "checkpoint")


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file in `folder` with its content, work folders included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_in_another_order_are_refused(long: Checkpoint, tmp_path: Path) -> None:
    def not_interleaved(weight: Tensor) -> Tensor:
        return weight.view(3, 2, 104, 208).transpose(0, 1).reshape(624, 208)

    name = "transformer.resblocks.0.attn.in_proj.weight"
    with changed(name, not_interleaved), pytest.raises(ParityError, match=r"grows most in block 0"):
        export_vit(long, tmp_path / "bundle", dtype="float32")


def test_a_wrong_weight_is_refused_and_nothing_is_written(long: Checkpoint, tmp_path: Path) -> None:
    for dtype in DTYPES:
        folder = tmp_path / dtype
        with changed("proj", lambda weight: weight.T), pytest.raises(ParityError, match=r"Nothing was written"):
            export_vit(long, folder, dtype=dtype)
        assert not folder.exists()


def test_a_refused_export_leaves_an_earlier_one_as_it_was(long: Checkpoint, tmp_path: Path) -> None:
    export_vit(long, tmp_path, dtype="int8")
    before = files_of(tmp_path)
    with changed("proj", lambda weight: weight.T), pytest.raises(ParityError):
        export_vit(long, tmp_path, dtype="float32")
    assert files_of(tmp_path) == before


def test_an_export_stopped_at_any_step_leaves_an_earlier_one_as_it_was(long: Checkpoint, tmp_path: Path) -> None:
    export_vit(long, tmp_path, dtype="int8")
    before, steps = files_of(tmp_path), 0

    def count(_line: str) -> None:
        nonlocal steps
        steps += 1

    export_vit(long, tmp_path / "other", dtype="float16", progress=count)
    shutil.rmtree(tmp_path / "other")
    assert steps >= 3
    for stop in range(steps):
        left = stop

        def interrupt(_line: str) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1

        with pytest.raises(KeyboardInterrupt):
            export_vit(long, tmp_path, dtype="float16", progress=interrupt)
        assert files_of(tmp_path) == before


def test_a_full_disk_is_a_bundle_error_that_leaves_nothing(long: Checkpoint, tmp_path: Path) -> None:
    def no_space(_tensor: Tensor) -> Tensor:
        raise OSError(errno.ENOSPC, "No space left on device")

    with changed("proj", no_space), pytest.raises(BundleError, match=r"is full .* nothing was replaced"):
        export_vit(long, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_the_vision_tower_of_another_model_is_refused_before_anything_is_written(
    long: Checkpoint, tiny: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "decoder").write_bytes(b"0")
    add_part(tmp_path, "decoder", ["decoder"], fingerprint=tiny.fingerprint)
    before = files_of(tmp_path)
    with pytest.raises(BundleError, match=tiny.fingerprint[:12]):
        export_vit(long, tmp_path)
    assert files_of(tmp_path) == before


def test_it_joins_the_decoder_of_the_same_model(long: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "decoder").write_bytes(b"0")
    add_part(tmp_path, "decoder", ["decoder"], fingerprint=long.fingerprint)
    parity = export_vit(long, tmp_path, dtype="int4", block_size=64)
    parts = json.loads((tmp_path / "bundle.json").read_text())["parts"]
    assert set(parts) == {"decoder", "vit"} and set(parts["vit"]["files"]) == {VIT, VIT_DATA}
    assert parts["vit"]["dtype"] == "int4" and parts["vit"]["block_size"] == 64
    assert parts["vit"]["parity"]["relative"] == parity.features.relative > 0
    assert set(files_of(tmp_path)) == {"decoder", "bundle.json", VIT, VIT_DATA}


def test_exporting_twice_gives_the_same_bytes(long: Checkpoint, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export_vit(long, tmp_path / name, dtype="int8")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_the_checkpoint_itself_is_not_written_to(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "tiny-long" / "checkpoint", tmp_path / "checkpoint")
    with pytest.raises(BundleError, match=r"is the checkpoint itself"):
        export_vit(Checkpoint(tmp_path / "checkpoint"), tmp_path / "checkpoint")
    assert VIT not in files_of(tmp_path / "checkpoint")


def test_values_past_float16_are_refused_where_they_first_appear(long: Checkpoint, tmp_path: Path) -> None:
    """c_fc scaled up and c_proj scaled down: the weights fit float16, the MLP's hidden values do not."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "tiny-long" / "checkpoint", folder)
    tensors = load_file(folder / "model.safetensors")
    mlp = f"{VISUAL}transformer.resblocks.0.mlp"
    for name, factor in (("c_fc.weight", 2.0**17), ("c_fc.bias", 2.0**17), ("c_proj.weight", 2.0**-17)):
        tensors[f"{mlp}.{name}"] = tensors[f"{mlp}.{name}"].float() * factor
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    assert float(checkpoint[f"{mlp}.c_fc.weight"].abs().max()) < 65504
    with pytest.raises(ParityError, match=r"65504\) in block 0\."):
        export_vit(checkpoint, tmp_path / "half", dtype="float16")
    assert export_vit(checkpoint, tmp_path / "single", dtype="float32").passed


def test_a_weight_past_float16_or_not_finite_is_named(long: Checkpoint, tmp_path: Path) -> None:
    for value, message in (
        (1e5, r"mlp\.c_fc\.weight reaches 100000, past float16"),
        (float("nan"), r"c_fc\.weight holds NaN"),
    ):

        def spoil(weight: Tensor, value: float = value) -> Tensor:
            weight = weight.float().clone()
            weight[3, 4] = value
            return weight

        name = "transformer.resblocks.0.mlp.c_fc.weight"
        with changed(name, spoil), pytest.raises(CheckpointError, match=message):
            export_vit(long, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_int8_activations_are_given_up_where_a_large_one_would_drown_the_others(
    long: Checkpoint, tmp_path: Path
) -> None:
    """One channel of ln_2 is 500 times as large, and no output uses it: it only sets its block's scale."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "tiny-long" / "checkpoint", folder)
    tensors = load_file(folder / "model.safetensors")
    block = f"{VISUAL}transformer.resblocks.0"
    tensors[f"{block}.ln_2.weight"][3] *= 500
    tensors[f"{block}.mlp.c_fc.weight"][:, 3] = 0
    save_file(tensors, folder / "model.safetensors")
    said: list[str] = []
    for checkpoint, level in ((long, 4), (Checkpoint(folder), 0)):
        bundle = tmp_path / f"level-{level}"
        assert export_vit(checkpoint, bundle, dtype="int8", progress=said.append).passed
        assert json.loads((bundle / "bundle.json").read_text())["parts"]["vit"]["accuracy_level"] == level
        nodes = onnx.load(str(bundle / VIT), load_external_data=False).graph.node
        levels = {a.i for node in nodes for a in node.attribute if a.name == "accuracy_level"}
        assert levels == {level}
    assert sum("int8 activations" in line for line in said) == 1


def test_a_dtype_or_block_size_that_does_not_exist_is_refused(long: Checkpoint, tmp_path: Path) -> None:
    for dtype, block_size in (("bfloat16", None), ("float16", 32), ("int4", 48)):
        with pytest.raises(ConfigError):
            export_vit(long, tmp_path / "bundle", dtype=dtype, block_size=block_size)
    assert not (tmp_path / "bundle").exists()


def test_weights_are_read_one_at_a_time(tiny: Checkpoint, tmp_path: Path) -> None:
    """Peak memory of the whole command on a tower of 150 MB in float16, which is compared in float32."""
    section = json.loads((tiny.path / "config.json").read_text())
    section["visual"] |= {"width": 512, "heads": 8, "layers": 24, "image_size": 56, "mlp_ratio": 4.0}
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(section))
    shapes = expected_tensors(Config.from_dict(section), decoder=False)
    pattern = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(4)) * 0.02).half()
    save_file(
        {name: pattern.repeat(2)[: torch.Size(shape).numel()].reshape(shape).clone() for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    program = (
        "import sys; from export.vit import main\n"
        "peak = lambda: next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('VmHWM'))\n"
        "before = peak(); code = main(sys.argv[1:]); print('grew', (peak() - before) // 1024, code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(tmp_path / "bundle")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    grew, code = (int(word) for word in done.stdout.splitlines()[-1].split()[1:])
    assert code == 0
    # MiB: a few blocks and onnxruntime itself, 90 to 165 measured; the float32 tower alone has 293, and the checkpoint,
    # whose pages are given back, and the new graph have 146 each
    assert 20 < grew < 250


def test_the_command_reports_on_stdout_and_tells_its_progress_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(GOLDEN / "tiny-long" / "checkpoint")
    assert main([source, str(tmp_path / "bundle"), "--dtype", "int8", "--per-layer"]) == 0
    out, err = capsys.readouterr()
    assert "passed" in out and all(f"\n{stage} " in out for stage in ("ln_pre", "block 0", "features"))
    assert "wrote block 1 of 1" in err and "MB" in err
    assert main([str(tmp_path / "nothing"), str(tmp_path / "bundle")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "nothing" in err and "Traceback" not in err
