"""The small model behind a server, once for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import qvl_edge.demo
from qvl_edge import Runtime
from qvl_edge.demo.scenes import Scene, make_scene
from qvl_edge.engine.worker import Worker

from .harness import Server, serving

CHECKPOINT = Path(qvl_edge.demo.__file__).parent / "checkpoint"
SCENES = (2_100_000_011, 2_100_000_013, 2_100_000_014)  # a red diamond; a purple triangle; a black circle


@pytest.fixture(scope="session")
def runtime(vit_cache: Path) -> Runtime:
    return Runtime.from_pretrained(CHECKPOINT, device="cpu", cache_dir=vit_cache)


@pytest.fixture(scope="session")
def server(runtime: Runtime) -> Iterator[Server]:
    with serving(Worker(runtime)) as running:
        yield running


@pytest.fixture(scope="session")
def scenes() -> list[Scene]:
    return [make_scene(seed) for seed in SCENES]
