"""qvl-edge doctor: a sound machine passes, and every broken one is a failure with a one-line fix."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import write_small_checkpoint

from export.part import export_vit
from kernels.gpu.tiles import DeviceKey
from qvl_edge import memory
from qvl_edge.__main__ import main
from qvl_edge.bundle import MANIFEST, add_part
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.commands.doctor import line
from qvl_edge.doctor import Finding, card, checks, examine, probe, run, self_tests
from qvl_edge.engine import device
from qvl_edge.text import font

Patch = pytest.MonkeyPatch
CARD = SimpleNamespace(name="NVIDIA GeForce RTX 3060", uuid="1-2-3")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle with a float decoder, which nothing here runs; a test that damages one takes a copy."""
    root = tmp_path_factory.mktemp("doctor")
    checkpoint = Checkpoint(write_small_checkpoint(root / "checkpoint"))
    folder = shutil.copytree(checkpoint.path, root / "bundle")
    add_part(folder, "decoder", [file.name for file in folder.iterdir()], fingerprint=checkpoint.fingerprint)
    export_vit(checkpoint, folder)
    return folder


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: Patch, tmp_path: Path) -> None:
    """A CPU, whatever these tests run on, and a cache folder of their own."""
    monkeypatch.setattr(probe, "cuda", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(device, "nvidia_smi", lambda *_: [])
    versions = {"onnxruntime": "1.32.0", "triton": "3.7.1"}
    monkeypatch.setattr(probe, "version", versions.get)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def with_card(monkeypatch: Patch, *, capability: tuple[int, int] = (8, 6), free: int = 10**10, **rows: Any) -> None:
    """A CUDA card, as far as anything can ask about it. rows: what nvidia-smi says, by query."""
    monkeypatch.setattr(probe, "cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: CARD)
    monkeypatch.setattr("kernels.gpu.tiles.device_key", lambda _: DeviceKey(capability, 28, 101_376))
    monkeypatch.setattr(memory, "device_memory", lambda _: memory.Memory(12 * 10**9, free))
    said = {"gpu": [["580.65.06", CARD.name]], "compute-apps": [], **rows}
    monkeypatch.setattr(device, "nvidia_smi", lambda what, *_: said[what])


def examine_one(check: str) -> Iterator[Finding]:
    yield run(check, checks.CHECKS[check])


def broken_card(monkeypatch: Patch, check: str, **card: Any) -> Iterator[Finding]:
    with_card(monkeypatch, **card)
    return examine_one(check)


def test_a_sound_machine_passes(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(bundle)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {text[2:18].strip() for text in lines[:-2]}
    assert names >= {"python", "torch", "onnxruntime", "kernels", "font", "int4_gemm", "bundle", "vision tower"}
    assert not any(text.startswith("✗") for text in lines) and lines[-1] == "all checks passed"
    # found stands in one column
    assert all(text[2:18].strip() and text[18:20] == "  " and text[20] != " " for text in lines[:-2])


def test_a_sound_card_passes(monkeypatch: Patch) -> None:
    for check in ("card in use", "card", "card memory"):
        (finding,) = broken_card(monkeypatch, check)
        assert (finding.name, finding.status) == (check, "ok")
    (finding,) = examine_one("card")
    assert "tiles not tuned" in finding.found  # the shipped tables are estimates
    assert "Ampere (sm_86)" in finding.found
    (finding,) = broken_card(monkeypatch, "card", capability=(7, 5))
    assert finding.status == "ok" and "Turing (sm_75), in float16 only" in finding.found


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_gcc_compiles_the_header_of_this_python(monkeypatch: Patch) -> None:
    monkeypatch.delenv("CC", raising=False)
    (finding,) = broken_card(monkeypatch, "C compiler")
    assert (finding.status, finding.found) == ("ok", "gcc")


def test_without_a_compiler_its_line_is_the_only_failure(monkeypatch: Patch, tmp_path: Path) -> None:
    list(no_compiler(monkeypatch, tmp_path))
    for kernel in checks.KERNELS:  # each would fail by the same thing
        (finding,) = examine_one(kernel)
        assert finding.status == "skipped" and "C compiler" in finding.found


# Broken machines: each breaks one thing and returns what examine finds.


def no_torch(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    monkeypatch.setitem(sys.modules, "torch", None)
    return examine()


def old_torch(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    monkeypatch.setattr(torch, "__version__", "2.3.1")
    return examine()


def no_onnxruntime(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    return examine()


def both_onnxruntimes(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    monkeypatch.setattr(probe, "version", {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}.get)
    return examine()


def provider_that_gives_way(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    fake = SimpleNamespace(
        __version__="1.31.1",
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        SessionOptions=SimpleNamespace,
        InferenceSession=lambda *_, **__: session,
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    return broken_card(monkeypatch, "onnxruntime")


def cpu_onnxruntime_beside_a_card(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    return broken_card(monkeypatch, "onnxruntime")


def no_triton(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    monkeypatch.setattr(probe, "version", {}.get)
    return broken_card(monkeypatch, "triton")


def old_triton(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    monkeypatch.setattr(probe, "version", {"triton": "3.2.0"}.get)
    return broken_card(monkeypatch, "triton")


def no_compiler(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    return broken_card(monkeypatch, "C compiler")


def compiler_that_is_not_there(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    monkeypatch.setenv("CC", "/no/cc")  # Triton then asks for no other one
    return broken_card(monkeypatch, "C compiler")


def no_python_header(monkeypatch: Patch, tmp_path: Path) -> Iterator[Finding]:
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    return broken_card(monkeypatch, "C compiler")


def two_cudas(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    monkeypatch.setattr(probe, "version", {"onnxruntime-gpu": "1.31.1"}.get)
    with_card(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    return examine_one("cuda row")


def foreign_kernels(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    monkeypatch.setattr(probe, "version", {"onnxruntime": "1.32.0", "kernels": "0.4.1"}.get)
    return examine()


def kernels_elsewhere(monkeypatch: Patch, tmp_path: Path) -> Iterator[Finding]:
    (tmp_path / "kernels").mkdir()
    origin = str(tmp_path / "kernels/__init__.py")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=origin))
    return examine_one("kernels")


def old_driver(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    with_card(monkeypatch, gpu=[["535.54.03", CARD.name]])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return examine_one("driver")


def torch_without_cuda(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    monkeypatch.setattr(device, "nvidia_smi", lambda *_: [["580.65.06", CARD.name]])
    return examine()


def old_card(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    return broken_card(monkeypatch, "card", capability=(6, 1))


def busy_card(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    apps = [["GPU-1-2-3", "4711", "7400 MiB", "python, train"], ["GPU-9-9-9", "1", "9 MiB", "on another card"]]
    return broken_card(monkeypatch, "card in use", **{"compute-apps": apps})


def full_card(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    return broken_card(monkeypatch, "card memory", free=3 * 10**8)


def no_font(monkeypatch: Patch, tmp_path: Path) -> Iterator[Finding]:
    monkeypatch.setattr(font, "SHIPPED", tmp_path / "no.otf")
    return examine()


def font_without_chinese(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    monkeypatch.setattr(checks, "LABEL", "car \U0010fffe")  # no font has it
    return examine()


def full_disk(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    return examine()


def locked_cache(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    monkeypatch.setattr(checks.os, "access", lambda *_: False)
    return examine()


def little_memory(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    monkeypatch.setattr(memory, "host_memory", lambda: memory.Memory(8 * 10**9, 2 * 10**8))
    return examine()


def wrong_kernel(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    right = self_tests.int4_gemm

    def wrong(x: torch.Tensor, weight: Any, *bias: torch.Tensor, backend: str | None = None) -> torch.Tensor:
        return right(x, weight, *bias, backend=backend) * (1.0 if backend == "torch" else 1.001)

    monkeypatch.setattr(self_tests, "int4_gemm", wrong)
    return examine()


def kernel_that_raises(monkeypatch: Patch, _: Path) -> Iterator[Finding]:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("no such operator\nin this torch")

    monkeypatch.setattr(self_tests, "int8_gemm", broken)
    return examine()


BROKEN: list[tuple[Callable[[Patch, Path], Iterator[Finding]], str, str, str]] = [
    (no_torch, "torch", "torch", "pip install 'torch>=2.6'"),
    (old_torch, "torch", "2.3.1", "pip install 'torch>=2.6'"),
    (no_onnxruntime, "onnxruntime", "onnxruntime", "pip install 'qvl-edge[cpu]'"),
    (both_onnxruntimes, "onnxruntime", "1.31.1", "pip uninstall -y onnxruntime onnxruntime-gpu"),
    (provider_that_gives_way, "onnxruntime", "does not start", "pip install 'qvl-edge[cuda]'"),
    (cpu_onnxruntime_beside_a_card, "onnxruntime", "has no CUDA", "pip install 'qvl-edge[cuda]'"),
    (no_triton, "triton", "not installed", "pip install 'triton>=3.6'"),
    (old_triton, "triton", "3.2.0", "pip install 'triton>=3.6'"),
    (no_compiler, "C compiler", "neither gcc nor clang", "apt-get install gcc python3-dev"),
    (compiler_that_is_not_there, "C compiler", "CC=/no/cc", "unset CC"),
    (no_python_header, "C compiler", "Python.h", "apt-get install gcc python3-dev"),
    (two_cudas, "cuda row", "onnxruntime-gpu 1.31.1 is built for CUDA 13", "pip install 'onnxruntime-gpu>=1.22,<1.27'"),
    (foreign_kernels, "kernels", "kernels 0.4.1", "pip uninstall -y kernels"),
    (kernels_elsewhere, "kernels", "another package", "pip uninstall -y kernels"),
    (old_driver, "driver", "535.54.03 does not run CUDA 13.0", "580"),
    (torch_without_cuda, "driver", "RTX 3060 is unused", "pytorch.org"),
    (old_card, "card", "6.1 (sm_61), the kernels need 7.5 (sm_75)", "--device cpu"),
    (busy_card, "card in use", "python, train (pid 4711, 7400 MiB)", "kill 4711"),
    (full_card, "card memory", "0.30 GB of 12.00 GB", "nvidia-smi"),
    (no_font, "font", "no.otf is missing", "pip install"),
    (font_without_chinese, "font", "has no", "pip install"),
    (full_disk, "cache folder", "1.00 GB free", "XDG_CACHE_HOME"),
    (locked_cache, "cache folder", "cannot be written to", "XDG_CACHE_HOME"),
    (little_memory, "host memory", "0.20 GB of 8.00 GB", "close"),
    (wrong_kernel, "int4_gemm", "allowed 1e-05", "pip install"),
    (kernel_that_raises, "int8_gemm", "no such operator in this torch", "pip install"),
]


@pytest.mark.parametrize(("machine", "name", "words", "fix"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_broken_is_found_and_nothing_else(
    machine: Callable[[Patch, Path], Iterator[Finding]],
    name: str,
    words: str,
    fix: str,
    monkeypatch: Patch,
    tmp_path: Path,
) -> None:
    findings = list(machine(monkeypatch, tmp_path))
    failed = [finding for finding in findings if finding.status == "failed"]
    assert [finding.name for finding in failed] == [name]
    assert words in failed[0].found and fix in failed[0].fix
    assert len(line(failed[0]).splitlines()) == 2
    assert all(not finding.fix for finding in findings if finding.status != "failed")


def test_a_hidden_card_is_no_failure(monkeypatch: Patch) -> None:
    monkeypatch.setattr(device, "nvidia_smi", lambda *_: [["580.65.06", CARD.name]])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    (finding,) = examine_one("driver")
    assert finding.status == "skipped" and "CUDA_VISIBLE_DEVICES=-1" in finding.found


def test_an_error_that_nobody_expected_is_a_failure_too(monkeypatch: Patch) -> None:
    def broken(_: Path | None) -> str:
        raise KeyError("driver")

    monkeypatch.setitem(checks.CHECKS, "driver", broken)
    failed = [finding for finding in examine() if finding.status == "failed"]
    assert [finding.name for finding in failed] == ["driver"] and "KeyError" in failed[0].found


@pytest.mark.parametrize("name", [name for name in self_tests.KERNELS if name not in self_tests.CPU_ALONE])
def test_the_gpu_self_tests_hold_in_the_interpreter(name: str) -> None:
    pytest.importorskip("triton", reason="needs the triton package, which Linux has")
    device = "cuda" if torch.cuda.device_count() else "cpu"
    assert self_tests.KERNELS[name](device, "triton") < checks.TOLERANCE["triton"]


def test_a_self_test_tells_a_kernel_that_is_off_by_one_level(monkeypatch: Patch) -> None:
    right = self_tests.PACK["cpu"]
    monkeypatch.setitem(self_tests.PACK, "cpu", lambda weight: right(replace(weight, zeros=weight.zeros + 1)))
    assert self_tests.KERNELS["int4_gemm"]("cpu", "cpu") > 100 * checks.TOLERANCE["cpu"]


def test_every_kernel_has_a_self_test() -> None:
    assert tuple(self_tests.KERNELS) == checks.KERNELS


def test_the_graph_is_what_onnx_makes_of_its_description() -> None:
    helper = pytest.importorskip("onnx").helper
    x, y = (helper.make_tensor_value_info(name, 1, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert model.SerializeToString() == checks.GRAPH


def damage_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def remove_tower(folder: Path) -> None:
    (folder / "vit.onnx.data").unlink()


def no_vit_yet(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    del content["parts"]["vit"]
    (folder / MANIFEST).write_text(json.dumps(content))


def other_vector(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    content["parts"]["vit"]["self_test"] = [[-x for x in row] for row in content["parts"]["vit"]["self_test"]]
    (folder / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "name", "words", "fix"),
    [
        (damage_weights, "bundle", "sha256", "python -m quantize.gptq CHECKPOINT"),
        (remove_tower, "bundle", "vit.onnx.data is missing", "python -m export.vit CHECKPOINT"),
        (no_vit_yet, "bundle", "has no vit yet", "python -m export.vit CHECKPOINT"),
        (other_vector, "vision tower", "cosine -1.0000", "python -m export.vit CHECKPOINT"),
    ],
)
def test_a_damaged_bundle_is_found(
    damage: Callable[[Path], None],
    name: str,
    words: str,
    fix: str,
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    damage(copy)
    assert main(["doctor", str(copy), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    failed = [finding for finding in said["findings"] if finding["status"] == "failed"]
    assert not said["ok"] and [finding["name"] for finding in failed] == [name]
    assert words in failed[0]["found"] and fix in failed[0]["fix"] and "\n" not in failed[0]["fix"]


def test_without_onnxruntime_the_hashes_of_a_bundle_are_checked_still(bundle: Path, monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "qvl_edge.vision.encoder", raising=False)
    status = {finding.name: finding.status for finding in examine(bundle)}
    assert (status["onnxruntime"], status["bundle"], status["vision tower"]) == ("failed", "ok", "skipped")


def test_an_untouched_checkpoint_is_checked_by_its_tensors(small_checkpoint: Path) -> None:
    assert all(finding.status != "failed" for finding in examine(small_checkpoint))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnx", None)  # which exports its tower
        (failed,) = [finding for finding in examine(small_checkpoint) if finding.status == "failed"]
        assert failed.name == "onnx" and "qvl-edge[export]" in failed.fix
        (finding,) = examine_one("onnx")
        assert finding.status == "skipped" and "qvl-edge[export]" in finding.found
    (small_checkpoint / "config.json").unlink()
    (failed,) = [finding for finding in examine(small_checkpoint) if finding.status == "failed"]
    assert "config.json is missing" in failed.found


def test_a_terminal_without_check_marks_gets_letters(capsys: pytest.CaptureFixture[str], monkeypatch: Patch) -> None:
    monkeypatch.setattr("qvl_edge.commands.loading.can_show", lambda _: False)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.startswith("ok python")


def test_the_least_versions_are_those_that_setup_asks_for() -> None:
    setup = (Path(__file__).parent.parent / "setup.py").read_text()
    for package, least in (("torch", checks.TORCH), ("triton", card.TRITON), ("python_requires=", checks.PYTHON)):
        assert re.search(rf'{package}"?>={".".join(map(str, least))}\b', setup), package
