"""The walls between the folders, and that `import qvl_edge` stays light."""

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "qvl_edge", "quantize", "export", "benchmarks", "tests")
MAY_IMPORT = {
    "kernels": set(),
    "qvl_edge": {"kernels"},
    "quantize": {"kernels", "qvl_edge"},
    "export": {"kernels", "qvl_edge"},
    "benchmarks": {"kernels", "qvl_edge", "quantize", "export"},
}
# third-party packages that a room must not need
NEVER = {
    "kernels": {"transformers", "onnx", "PIL", "safetensors", "tiktoken", "numpy"},
    "qvl_edge": {"transformers", "onnx", "triton", "auto_gptq", "optimum"},
    "quantize": {"transformers", "onnx", "auto_gptq", "optimum"},
    "export": {"transformers", "auto_gptq", "optimum"},
    "benchmarks": set(),
}
# inside qvl_edge, from the top down; a file imports its own layer and those below
LAYERS = (
    ("commands", "server", "evaluate", "__main__", "compat"),
    ("bench",),
    ("runtime", "batch"),
    ("load",),
    ("vit_cache", "hub", "labels", "answer", "engine", "demo", "doctor"),
    ("model", "text", "vision"),
    ("bundle", "checkpoint", "lora", "shards"),
    ("published", "memory", "machine", "plot"),
    ("config", "arguments", "options"),
    ("option",),
    ("files", "child"),
    ("errors",),
)


@functools.cache
def imports_of(file: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_they_may(room: str) -> None:
    assert files_of(room)
    for file in files_of(room):
        tops = {name.split(".")[0] for name in imports_of(file)}
        assert not (tops & set(ROOMS)) - MAY_IMPORT[room] - {room}, file
        assert not tops & NEVER[room], file


def test_triton_is_imported_in_one_folder_only() -> None:
    for room in MAY_IMPORT:
        for file in files_of(room):
            if any(name.split(".")[0] == "triton" for name in imports_of(file)):
                assert file.parent == ROOT / "kernels/gpu" or room == "benchmarks", file


def layer_of(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] != "qvl_edge" or len(parts) == 1:
        return None
    return next((index for index, names in enumerate(LAYERS) if parts[1] in names), None)


def test_inside_qvl_edge_imports_go_down_only() -> None:
    for file in files_of("qvl_edge"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        own = layer_of(module)
        if own is None:  # qvl_edge/__init__.py, the door
            assert file.parent == ROOT / "qvl_edge", f"{file} is in no layer"
            continue
        for name in imports_of(file):
            other = layer_of(name)
            assert other is None or other >= own, f"{file} imports {name} from a layer above"


def test_the_walls_would_catch_an_upward_import(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from qvl_edge.runtime import Runtime\n    import triton.language as tl\n")
    assert imports_of(file) == {"qvl_edge.runtime.Runtime", "triton.language"}
    assert layer_of("qvl_edge.runtime.Runtime") < layer_of("qvl_edge.model.decoder")


def test_commands_run_with_m_are_not_imported_by_their_siblings() -> None:
    for module in ("quantize.gptq", "export.vit"):
        for file in files_of(module.split(".")[0]):
            assert not any(name.startswith(module) for name in imports_of(file)), file


@functools.cache
def modules_after(statement: str) -> set[str]:
    """The packages that a new process has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in run.stdout.split()}


EVERYTHING = "from qvl_edge import Runtime; import qvl_edge.compat, qvl_edge.commands.pull"


def test_importing_the_package_stays_light() -> None:
    heavy = {"torch", "triton", "onnx", "onnxruntime", "transformers", "PIL", "numpy", "tiktoken"}
    assert not modules_after("import qvl_edge") & heavy


@pytest.mark.slow
def test_a_hubs_client_is_loaded_when_a_model_is_fetched_only() -> None:
    assert not modules_after(EVERYTHING) & {"huggingface_hub", "modelscope_hub", "requests"}


@pytest.mark.slow
def test_importing_the_kernels_loads_neither_triton_nor_cuda() -> None:
    code = "import kernels, torch, sys; print('triton' in sys.modules, torch.cuda.is_initialized())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


@pytest.mark.slow
def test_the_runtime_needs_neither_onnx_nor_triton_nor_transformers() -> None:
    assert not modules_after(EVERYTHING) & {"onnx", "triton", "transformers", "matplotlib"}


@pytest.mark.slow
def test_building_a_decoder_loads_no_compiler() -> None:
    build = "from conftest import SMALL; from qvl_edge.config import Config; from qvl_edge.model.decoder import *"
    statement = f"import sys, torch; sys.path.append('tests'); {build}; config = Config.from_dict(SMALL)"
    assert "sympy" not in modules_after(f"{statement}\nwith torch.device('meta'): QWenLMHeadModel(config)")


@pytest.mark.slow
def test_another_package_named_kernels_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\nfrom qvl_edge.model import linear"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0
    assert "is not qvl_edge's" in run.stderr and str(tmp_path / "kernels") in run.stderr


def test_every_public_name_of_the_package_exists() -> None:
    import qvl_edge

    for name in qvl_edge.__all__:
        assert getattr(qvl_edge, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = qvl_edge.Nothing


@pytest.mark.parametrize("module", ["qvl_edge", "kernels"])
def test_onnxruntime_leaves_no_telemetry(module: str, tmp_path: Path) -> None:
    """It writes a device id and a database of events into the cache folder when it is imported, unless it is told."""
    code = f"import {module}, onnxruntime; onnxruntime.SessionOptions()"
    outside = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    homes = dict.fromkeys(("XDG_CACHE_HOME", "XDG_DATA_HOME", "HOME"), str(tmp_path))
    subprocess.run([sys.executable, "-c", code], env=outside | homes, cwd=ROOT, check=True)
    assert not list(tmp_path.rglob("*"))
