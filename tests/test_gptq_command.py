import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA, SMALL, write_small_checkpoint
from PIL import Image
from safetensors.torch import load_file

from kernels import dequantize_gptq
from quantize import estimate, gptq, job
from quantize.blocks import causal_attention, load_block, projection
from quantize.calibration import Activations
from quantize.job import Event, quantize_checkpoint
from quantize.solver import Method
from qvl_edge import bundle
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import QuantConfig
from qvl_edge.errors import BundleError, CheckpointError, ConfigError
from qvl_edge.memory import Memory
from qvl_edge.model.loading import check_tensors, load_decoder, read_projection
from qvl_edge.text.conversations import Sample

pytestmark = pytest.mark.slow

FILES = {
    "bundle.json",
    "config.json",
    "generation_config.json",
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    "quantize_config.json",
    "quantize_report.json",
    "qwen.tiktoken",
}
QUANT = QuantConfig(group_size=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(write_small_checkpoint(tmp_path_factory.mktemp("gptq") / "checkpoint"))


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three conversations, one of them with a picture."""
    folder = tmp_path_factory.mktemp("calibration")
    Image.new("RGB", (30, 20), (200, 10, 10)).save(folder / "red.png")
    texts = [("<img>red.png</img>\nWhich colour?", "Red."), ("Hello", "Good morning."), ("二加二?", "四。")]
    entries = [
        {"conversations": [{"from": "user", "value": query}, {"from": "assistant", "value": answer}]}
        for query, answer in texts
    ]
    (folder / "data.json").write_text(json.dumps(entries))
    return folder / "data.json"


@pytest.fixture
def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    lengths = (30, 17, 45)
    return [Sample(torch.randint(0, 256, (n,), generator=generator).tolist(), [], [], [], "test") for n in lengths]


def content(folder: Path) -> dict[str, bytes]:
    """Every file below the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(checkpoint: Checkpoint, folder: Path, *options: str | Path) -> int:
    return gptq.main([str(checkpoint.path), str(folder), "--device", "cpu", *map(str, options)])


def test_the_command_makes_a_decoder_that_loads(
    checkpoint: Checkpoint, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "made" / "bundle"
    assert command(checkpoint, folder, "--calibration", calibration, "--group-size", "64") == 0
    out, err = capsys.readouterr()
    assert {path.name for path in folder.iterdir()} == FILES
    made = Checkpoint(folder)
    assert made.config.quantization == QuantConfig(group_size=64)
    check_tensors(made, visual=False)
    load_decoder(made, dtype=torch.float32)
    rows = [line.split() for line in out.splitlines() if line.startswith("transformer.h.")]
    assert [row[0] for row in rows] == [
        f"transformer.h.{index}.{layer}"
        for index in range(2)
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    ]
    assert all(0 < float(row[3]) < float(row[4]) for row in rows)  # GPTQ's error, and that of rounding
    assert "python -m export.vit CHECKPOINT" in out
    assert "%" in err
    assert "%" not in out


def test_tensors_have_the_names_and_dtypes_of_the_published_int4_checkpoint(
    checkpoint: Checkpoint, tmp_path: Path, samples: list[Sample]
) -> None:
    published = json.loads((DATA / "published" / "Qwen-VL-Chat-Int4" / "tensors.json").read_text())
    wanted = {
        name
        for name in published
        if "visual" not in name and (not name.startswith("transformer.h.") or int(name.split(".")[2]) < 2)
    }
    quantize_checkpoint(checkpoint, tmp_path / "bundle", QUANT, samples)
    made = Checkpoint(tmp_path / "bundle")
    assert set(made.names) == wanted
    for name in made.names:
        integer = name.endswith(("qweight", "qzeros", "g_idx"))
        assert made[name].dtype == (torch.int32 if integer else torch.float16)
    for name in ("lm_head.weight", "transformer.wte.weight", "transformer.h.1.ln_2.weight"):
        assert torch.equal(made[name], checkpoint[name])


@pytest.mark.parametrize(
    "quant",
    [
        QuantConfig(bits=8, group_size=-1, sym=False, desc_act=True),
        QuantConfig(group_size=32, desc_act=True, static_groups=True, true_sequential=False),
        QuantConfig(group_size=64, checkpoint_format="gptq_v2"),
    ],
    ids=["8 bits by activity", "static groups by activity", "v2"],
)
def test_every_kind_of_quantization_reads_back_close_to_the_source(
    quant: QuantConfig, checkpoint: Checkpoint, tmp_path: Path, samples: list[Sample]
) -> None:
    # what is rounded is then the source itself, and not a weight that makes up for an earlier block
    quantize_checkpoint(checkpoint, tmp_path / "bundle", quant, samples, method=Method(follow=0.0))
    made = Checkpoint(tmp_path / "bundle")
    assert made.config.quantization == quant
    load_decoder(made, dtype=torch.float32)
    for layer in ("attn.c_attn", "mlp.c_proj"):
        name = f"transformer.h.1.{layer}"
        source = checkpoint[f"{name}.weight"].float()
        error = (read_projection(made, name) - source).square().sum() / source.square().sum()
        assert float(error) < (1e-3 if quant.bits == 8 else 0.04)


def test_report_and_manifest_say_how_the_bundle_was_made(
    checkpoint: Checkpoint, tmp_path: Path, samples: list[Sample]
) -> None:
    result = quantize_checkpoint(checkpoint, tmp_path / "bundle", QUANT, samples)
    report = json.loads((tmp_path / "bundle" / "quantize_report.json").read_text())
    assert report["layers"] == [asdict(layer) for layer in result.layers]
    entry = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["parts"]["decoder"]
    assert entry["fingerprint"] == checkpoint.fingerprint
    assert entry["quantization"] == QUANT.to_dict()
    assert entry["calibration"]["tokens"] == 92
    assert set(entry["files"]) == FILES - {"bundle.json"}


def test_rounding_to_nearest_needs_no_data(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(checkpoint, tmp_path / "bundle", "--round-to-nearest", "--group-size", "32") == 0
    load_decoder(Checkpoint(tmp_path / "bundle"), dtype=torch.float32)
    entry = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["parts"]["decoder"]
    assert (entry["method"], entry["calibration"]) == ("round-to-nearest", None)


def test_missing_calibration_is_answered_with_an_example(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(checkpoint, tmp_path / "bundle") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "--calibration conversations.json" in err
    assert '"from": "assistant"' in err
    assert not (tmp_path / "bundle").exists()


def test_a_finished_bundle_is_replaced_only_on_request(
    checkpoint: Checkpoint, tmp_path: Path, samples: list[Sample]
) -> None:
    folder = tmp_path / "bundle"
    assert not quantize_checkpoint(checkpoint, folder, QUANT, samples).already_done
    before = content(folder)
    again = quantize_checkpoint(checkpoint, folder, QUANT, samples)
    assert again.already_done
    assert len(again.layers) == 10
    with pytest.raises(BundleError, match=r"finished.*quantization\.bits is 4 there and 8 here.*--overwrite"):
        quantize_checkpoint(checkpoint, folder, QuantConfig(bits=8, group_size=32), samples)
    with pytest.raises(BundleError, match=r"calibration\.samples is 3 there and 2 here"):
        quantize_checkpoint(checkpoint, folder, QUANT, samples[:2])
    assert content(folder) == before
    (folder / "quantize_config.json").write_text("{}")
    with pytest.raises(BundleError, match="damaged"):
        quantize_checkpoint(checkpoint, folder, QUANT, samples)
    quantize_checkpoint(checkpoint, folder, QUANT, samples, overwrite=True)
    assert content(folder) == before
    # rounding to nearest gives other shards and no calibration: nothing of the old decoder stays behind
    quantize_checkpoint(checkpoint, folder, QuantConfig(group_size=64), None, overwrite=True)
    quantize_checkpoint(checkpoint, tmp_path / "fresh", QuantConfig(group_size=64), None)
    assert content(folder) == content(tmp_path / "fresh")


class Stop(BaseException):
    """Stands for the end of the process."""


def stop_in_block(index: int) -> Callable[[Event], None]:
    def progress(event: Event) -> None:
        if event.text.startswith(f"block {index + 1}/"):
            raise Stop

    return progress


def test_unfinished_work_is_resumed_with_its_settings_only(
    checkpoint: Checkpoint, tmp_path: Path, samples: list[Sample]
) -> None:
    folder = tmp_path / "bundle"
    with pytest.raises(Stop):
        quantize_checkpoint(checkpoint, folder, QUANT, samples, progress=stop_in_block(1))
    with pytest.raises(BundleError, match="unfinished quantization"):
        bundle.Bundle.open(folder)
    with pytest.raises(BundleError, match=r"quantization\.group_size is 32 there and 64 here"):
        quantize_checkpoint(checkpoint, folder, QuantConfig(group_size=64), samples)
    with pytest.raises(BundleError, match=r"calibration\.sha256"):
        quantize_checkpoint(checkpoint, folder, QUANT, [samples[1], samples[0], samples[2]])
    other = Checkpoint(write_small_checkpoint(tmp_path / "other", seed=1))
    with pytest.raises(BundleError, match=r"fingerprint is '?[0-9a-f]{12}… there"):
        quantize_checkpoint(other, folder, QUANT, samples)
    assert quantize_checkpoint(checkpoint, folder, QUANT, samples).resumed_blocks == 1
    quantize_checkpoint(checkpoint, tmp_path / "straight", QUANT, samples)
    assert content(folder) == content(tmp_path / "straight")


def test_overwrite_drops_unfinished_work_with_other_settings(
    checkpoint: Checkpoint, tmp_path: Path, samples: list[Sample]
) -> None:
    folder, other = tmp_path / "bundle", QuantConfig(group_size=64)
    with pytest.raises(Stop):
        quantize_checkpoint(checkpoint, folder, QUANT, samples, progress=stop_in_block(1))
    assert quantize_checkpoint(checkpoint, folder, other, samples, overwrite=True).resumed_blocks == 0
    quantize_checkpoint(checkpoint, tmp_path / "straight", other, samples)
    assert content(folder) == content(tmp_path / "straight")


@pytest.mark.parametrize("replaced", [False, True], ids=["into an empty folder", "over an older decoder"])
def test_every_state_of_the_disk_on_the_way_leads_to_the_same_bundle(
    replaced: bool, checkpoint: Checkpoint, tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is copied before each rename, removal and sweep, as a kill there would leave it, and resumed."""
    monkeypatch.setattr(estimate.Workload, "seconds", lambda self: (1.0, 1e9))  # half of the time otherwise
    folder, states = tmp_path / "bundle", tmp_path / "states"
    quant = QuantConfig(group_size=64)
    if replaced:
        quantize_checkpoint(checkpoint, folder, QUANT, None)
    before = content(folder) if replaced else {}

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def function(path: Path, *arguments: Any, **options: Any) -> Any:
            if Path(path).exists():
                shutil.copytree(folder, states / f"{len(list(states.iterdir())):03d}")
            return original(path, *arguments, **options)

        return function

    states.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", watched(Path.replace))
        patch.setattr(Path, "unlink", watched(Path.unlink))
        patch.setattr(shutil, "rmtree", watched(shutil.rmtree))
        quantize_checkpoint(checkpoint, folder, quant, samples, overwrite=replaced)
    expected = content(folder)
    found = sorted(states.iterdir())
    assert len(found) > 25
    for state in found:
        if content(state).get("bundle.json") == before.get("bundle.json") and "bundle.json" in before:
            # until the new decoder is complete the old one is whole, or the folder is known to be unfinished
            whole = all(content(state).get(name) == data for name, data in before.items())
            assert whole or (state / bundle.WORK / "ready.json").exists()
        quantize_checkpoint(checkpoint, state, quant, samples, overwrite=replaced)
        assert content(state) == expected, state.name
        shutil.rmtree(state)


KILLS = """
import os, random, shutil, signal, sys, threading, time
from pathlib import Path
from quantize import gptq

arguments, folder, seed = sys.argv[3:], Path(sys.argv[1]), int(sys.argv[2])

def kill_after(seconds):
    # seconds of computing, not of the clock, so that the points are random on a busy machine too
    while time.process_time() < seconds:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)

def run(target, seconds=None):
    # in a fork of this process, which has imported everything: a start from nothing would take seconds each
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
        if seconds is not None:
            threading.Thread(target=kill_after, args=(seconds,), daemon=True).start()
        code = 1
        try:
            code = gptq.main([arguments[0], str(target), *arguments[1:]])
        finally:
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    return status, usage.ru_utime + usage.ru_stime

def content(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}

status, whole = run(folder / "straight")
assert status == 0
expected, rng, killed = content(folder / "straight"), random.Random(seed), 0
while killed < 5:  # one kill in every fifth of the run
    target = folder / "killed"
    status, _ = run(target, whole * (killed + rng.random()) / 5)
    killed += status == signal.SIGKILL
    assert run(target)[0] == 0
    assert content(target) == expected
    shutil.rmtree(target)
print(killed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the kills are those of POSIX")
def test_killed_at_five_random_points_and_resumed_the_bundle_is_byte_identical(
    tmp_path: Path, calibration: Path
) -> None:
    sizes = {"hidden_size": 256, "kv_channels": 128}
    source = write_small_checkpoint(tmp_path / "checkpoint", visual=SMALL["visual"] | {"output_dim": 256}, **sizes)
    options = [source, "--calibration", calibration, "--device", "cpu"]
    run = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path, "7", *options],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads do not survive a fork
        capture_output=True,
        text=True,
        timeout=900,  # a guard against hanging; it takes about 12 s of computing
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["5"]


def test_ctrl_c_says_how_to_resume(
    checkpoint: Checkpoint,
    calibration: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "run_block", interrupted)
        assert command(checkpoint, tmp_path / "bundle", "--calibration", calibration) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert command(checkpoint, tmp_path / "bundle", "--calibration", calibration) == 0


def test_a_full_disk_is_named_before_anything_is_computed(
    checkpoint: Checkpoint, tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    events: list[Event] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(BundleError, match=r"needs \d+\.\d MB and its disk has 0\.1 MB free.*shorter --seqlen"):
        quantize_checkpoint(checkpoint, tmp_path / "made" / "bundle", QUANT, samples, progress=events.append)
    assert events == []
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_holds_the_bundle_but_not_the_activations_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four files of 92 tokens of 128 channels in float32 are 188,416 bytes."""
    quantize_checkpoint(checkpoint, tmp_path / "bundle", QUANT, samples)
    shards = sum(file.stat().st_size for file in (tmp_path / "bundle").glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=shards + 150_000))
    with pytest.raises(
        BundleError, match=r"; 0\.2 MB are for calibration: fewer --samples or a shorter --seqlen need less"
    ):
        quantize_checkpoint(checkpoint, tmp_path / "other", QUANT, samples)
    quantize_checkpoint(checkpoint, tmp_path / "rounded", QUANT, None)


def test_too_little_memory_is_named_before_anything_is_written(
    checkpoint: Checkpoint, tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "host_memory", lambda: Memory(total=10_000_000, free=1_000_000))
    message = r"about \d+\.\d MB of host memory, and 1\.0 MB is free.*--device cuda, or give a --seqlen below 45"
    with pytest.raises(ConfigError, match=message):
        quantize_checkpoint(checkpoint, tmp_path / "bundle", QUANT, samples)
    assert not (tmp_path / "bundle").exists()


def test_an_estimate_of_memory_disk_and_time_comes_first(
    checkpoint: Checkpoint, tmp_path: Path, samples: list[Sample]
) -> None:
    events: list[Event] = []
    quantize_checkpoint(checkpoint, tmp_path / "bundle", QUANT, samples, progress=events.append)
    assert events[0].lasting
    assert re.fullmatch(
        r"estimate: .* of memory; .* of disk, of which .* stay; .* at the \d+ GFLOP/s just measured", events[0].text
    )
    stay = float(re.findall(r"([\d.]+) MB stay", events[0].text.replace(" of disk, of which", "", 1))[0])
    shards = sum(file.stat().st_size for file in (tmp_path / "bundle").glob("*.safetensors"))
    assert abs(stay - shards / 1e6) < 0.1  # the headers are left out


HOLD = """
import sys
from pathlib import Path
from quantize.files import open_work

with open_work(Path(sys.argv[1]), Path("nowhere"), {"fingerprint": ""}, overwrite=False):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_two_quantizations_of_one_bundle_at_once_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, samples: list[Sample]
) -> None:
    folder = tmp_path / "bundle"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None and other.stdin is not None
    assert other.stdout.readline() == "locked\n"
    for overwrite in (False, True):
        with pytest.raises(BundleError, match="another quantization is running in"):
            quantize_checkpoint(checkpoint, folder, QUANT, samples, overwrite=overwrite)
    other.kill()  # without a word: its lock goes with it
    other.wait()
    other.stdin.close()
    other.stdout.close()
    quantize_checkpoint(checkpoint, folder, QUANT, samples)
    assert {path.name for path in folder.iterdir()} == FILES


def test_activations_are_in_a_file_and_one_sample_in_memory(
    checkpoint: Checkpoint, tmp_path: Path, samples: list[Sample]
) -> None:
    """What enters block 2 is on the disk in float32, sample after sample, while that block is at work."""
    with pytest.raises(Stop):
        quantize_checkpoint(checkpoint, tmp_path / "bundle", QUANT, samples, progress=stop_in_block(1))
    (file,) = (tmp_path / "bundle" / bundle.WORK).glob("inputs-*")
    assert file.stat().st_size == 92 * 128 * 4
    stored = Activations(file, [30, 17, 45], 128)
    block = load_block(checkpoint, 0, "cpu")
    name = "transformer.h.0"
    made = load_file(tmp_path / "bundle" / bundle.WORK / "model-00001-of-00003.safetensors")
    for layer in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"):
        parts = [made[f"{name}.{layer}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
        projection(block, layer).weight.copy_(dequantize_gptq(*parts, bits=4, group_size=32))
    table = checkpoint["transformer.wte.weight"].float()
    for sample, found in zip(samples, stored, strict=True):
        expected = block(table[torch.tensor(sample.ids)][None], causal_attention(checkpoint.config, len(found), "cpu"))
        assert float((found - expected[0]).norm() / expected.norm()) < 1e-5  # the same products in the same order
    with pytest.raises(BundleError, match=r"has 47104 bytes, and these samples have 46592"):
        Activations(file, [30, 17, 44], 128)
    (exact,) = (tmp_path / "bundle" / bundle.WORK).glob("exact-*")
    block = load_block(checkpoint, 0, "cpu")
    for sample, found in zip(samples, Activations(exact, [30, 17, 45], 128), strict=True):
        expected = block(table[torch.tensor(sample.ids)][None], causal_attention(checkpoint.config, len(found), "cpu"))
        assert torch.equal(found, expected[0])
    exact.unlink()
    with pytest.raises(BundleError, match=r"exact-00001\.float32 is missing, so the run cannot resume"):
        quantize_checkpoint(checkpoint, tmp_path / "bundle", QUANT, samples)


def test_the_checkpoint_itself_and_foreign_folders_are_left_alone(
    checkpoint: Checkpoint, tmp_path: Path, samples: list[Sample]
) -> None:
    before = content(checkpoint.path)
    with pytest.raises(BundleError, match="is the checkpoint itself"):
        quantize_checkpoint(checkpoint, checkpoint.path, QUANT, samples, overwrite=True)
    assert content(checkpoint.path) == before
    other = write_small_checkpoint(tmp_path / "other")
    before = content(other)
    with pytest.raises(BundleError, match="is not a bundle"):
        quantize_checkpoint(checkpoint, other, QUANT, samples, overwrite=True)
    assert content(other) == before


def test_a_vit_of_another_model_is_not_mixed_in(checkpoint: Checkpoint, tmp_path: Path, samples: list[Sample]) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "vit.onnx").write_bytes(b"graph")
    bundle.add_part(folder, "vit", ["vit.onnx"], fingerprint="0" * 64, info={"dtype": "float16"})
    with pytest.raises(BundleError, match="holds the vit of another model"):
        quantize_checkpoint(checkpoint, folder, QUANT, samples)


def test_a_vit_of_this_model_stays(checkpoint: Checkpoint, tmp_path: Path, samples: list[Sample]) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "vit.onnx").write_bytes(b"graph")
    bundle.add_part(folder, "vit", ["vit.onnx"], fingerprint=checkpoint.fingerprint, info={"dtype": "float16"})
    quantize_checkpoint(checkpoint, folder, QUANT, samples)
    assert bundle.Bundle.open(folder, verify=True).vit.read_bytes() == b"graph"


def test_options_that_cannot_be_met_are_refused(checkpoint: Checkpoint, tmp_path: Path, samples: list[Sample]) -> None:
    folder = tmp_path / "bundle"
    with pytest.raises(ConfigError, match="group_size 96 does not divide 128"):
        quantize_checkpoint(checkpoint, folder, QuantConfig(group_size=96), samples)
    with pytest.raises(ConfigError, match="rounding to nearest has none"):
        quantize_checkpoint(checkpoint, folder, QuantConfig(group_size=32, desc_act=True), None)
    with pytest.raises(ConfigError, match="device is 'tpu'"):
        quantize_checkpoint(checkpoint, folder, QUANT, samples, device="tpu")
    assert not folder.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_a_gpu_is_refused_as_by_the_runtime(
    device: str, checkpoint: Checkpoint, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(tmp_path / "bundle")
    assert gptq.main([str(checkpoint.path), bundle, "--calibration", str(calibration), "--device", device]) == 1
    assert f"error: device is '{device}', but torch" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=rf"device is '{device}', but torch .* or use device='cpu'"):
        quantize_checkpoint(checkpoint, tmp_path / "bundle", QUANT, None, device=device)
    assert list(tmp_path.iterdir()) == []


def test_one_of_several_gpus_can_be_named(
    checkpoint: Checkpoint, tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine "cpu:0" stands for a device with an index. bundle.json has its type only, as ever."""
    asked: list[str] = []

    def found(name: str, *, kernels: bool) -> torch.device:
        assert not kernels  # GPTQ also runs on cards that are too old for them
        asked.append(name)
        return torch.device("cpu", 0)

    monkeypatch.setattr(job, "find_device", found)
    monkeypatch.setattr(gptq, "find_device", lambda name, *, kernels: torch.device(name))
    options = [str(checkpoint.path), str(tmp_path / "command"), "--round-to-nearest", "--device", "cuda:1"]
    assert gptq.main(options) == 0
    quantize_checkpoint(checkpoint, tmp_path / "bundle", QUANT, samples, device="cuda:3")
    assert asked == ["cuda:1", "cuda:3"]
    monkeypatch.undo()
    quantize_checkpoint(checkpoint, tmp_path / "straight", QUANT, samples, device="cpu")
    assert content(tmp_path / "bundle") == content(tmp_path / "straight")


def test_a_checkpoint_without_its_tokenizer_is_refused(tmp_path: Path, samples: list[Sample]) -> None:
    source = write_small_checkpoint(tmp_path / "checkpoint")
    (source / "qwen.tiktoken").unlink()
    with pytest.raises(CheckpointError, match=r"lacks qwen\.tiktoken"):
        quantize_checkpoint(Checkpoint(source), tmp_path / "bundle", QUANT, samples)
