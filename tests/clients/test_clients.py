"""Each script of this folder, in the environment of its client, against the small model.

An environment is a folder below QVL_EDGE_CLIENTS: a virtual environment of the script's name, or, for JavaScript, one
called `node` with node_modules. Each script is skipped where its environment is missing:

    python -m venv clients/litellm_python && clients/litellm_python/bin/pip install litellm
    QVL_EDGE_CLIENTS=$PWD/clients pytest tests/clients -rs
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from server.harness import MODEL, Server, serving

import qvl_edge.demo
from qvl_edge import Runtime
from qvl_edge.demo.scenes import make_scene
from qvl_edge.engine.worker import Worker

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SCRIPTS = sorted(path for path in HERE.iterdir() if path.name.endswith(("_python.py", "_benchmark.py", "_node.mjs")))


@pytest.fixture(scope="module")
def server(vit_cache: Path) -> Iterator[Server]:
    checkpoint = Path(qvl_edge.demo.__file__).parent / "checkpoint"
    runtime = Runtime.from_pretrained(checkpoint, device="cpu", cache_dir=vit_cache, slots=2)
    with serving(Worker(runtime), aliases=(f"gpt-4o-{MODEL}",)) as running:
        yield running


def command(script: Path) -> tuple[list[str], Path]:
    """How to run a script, and in which folder. Skips where its environment is missing."""
    root = Path(os.environ.get("QVL_EDGE_CLIENTS", "no-such-folder"))
    if script.suffix == ".mjs":
        node, folder = shutil.which("node"), root / "node"
        if node is None or not (folder / "node_modules").is_dir():
            pytest.skip(f"needs node and {folder}/node_modules")
        return [node, shutil.copy(script, folder)], folder  # node looks for modules from a script's folder on
    python = root / script.stem / "bin/python"
    if not python.exists():
        pytest.skip(f"needs {python}")
    return [str(python), str(script)], HERE


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_client_works_as_it_is(script: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    arguments, folder = command(script)  # before the model is loaded
    server = request.getfixturevalue("server")
    picture = tmp_path / "scene.png"
    make_scene(2_100_000_011).image.resize((640, 400)).save(picture)  # a red diamond
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    arguments += [f"{server.url}/v1", MODEL, str(picture)]
    said = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, (said.stdout + said.stderr)[-3000:]
    assert said.stdout.startswith("using: ") and "passed: " in said.stdout
