"""What the vision tower takes of memory: what is foretold is what a process of its own takes, and gives back."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from export.graph import VisualWeights, build_vit
from export.precision import ExternalData, Precision
from qvl_edge.bundle import VIT, VIT_DATA
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config
from qvl_edge.model.loading import expected_tensors
from qvl_edge.published import CONFIG
from qvl_edge.vision.memory import parameters, session_bytes, workspace_bytes

pytestmark = pytest.mark.slow

DTYPES = ("float32", "float16", "int8", "int4")
RELEASED = ("float32", "int4")  # the largest one, and one that onnxruntime repacks
# bytes: libraries are paged in 64 KiB at a time and the C library and the arena round up; towers here take 40 to 180 MB
TOLERANCE = 15_000_000
CODE = 40_000_000  # bytes: what onnxruntime leaves behind, 23 to 27 MB measured; the smallest session here takes 53 MB
PROGRAM = """
import json, sys, torch
from pathlib import Path
from qvl_edge.config import VisualConfig
from qvl_edge.memory import peak_host_bytes, reset_peak, resident_bytes
from qvl_edge.vision.encoder import VisionEncoder
path, visual = sys.argv[1], VisualConfig(**json.loads(sys.argv[2]))
batch, release = int(sys.argv[3]), sys.argv[4] == "1"
pixels = torch.randn(batch, 3, visual.image_size, visual.image_size)
before = resident_bytes()
encoder = VisionEncoder(path, visual, max_batch=batch, release=release)
reset_peak()
features = [encoder.encode(pixels) for _ in range(2)]
peak, after = peak_host_bytes(), resident_bytes()
encoder.close()
print(json.dumps([figure - before for figure in (peak, after, resident_bytes())]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tower of 38 million weights, random and sane."""
    section = CONFIG | {"hidden_size": 512, "num_attention_heads": 4}
    sizes = {"width": 512, "heads": 8, "layers": 12, "image_size": 224, "mlp_ratio": 4.0, "output_dim": 512}
    section["visual"] = CONFIG["visual"] | sizes
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text(json.dumps(section))
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.04).half()
        for name, shape in expected_tensors(Config.from_dict(section), decoder=False).items()
    }
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder)


def write_tower(checkpoint: Checkpoint, folder: Path, dtype: str) -> None:
    """As the export does, without its comparison, which takes longer than all of this."""
    visual = checkpoint.config.visual
    sizes = {name: str(getattr(visual, name)) for name in ("image_size", "patch_size", "output_dim")}
    metadata = {"fingerprint": checkpoint.fingerprint, "dtype": dtype, **sizes}
    with open(folder / VIT_DATA, "wb") as file:
        weights, data = VisualWeights(checkpoint, visual), ExternalData(file, VIT_DATA)
        graph = build_vit(weights, data, Precision.of(dtype, None), metadata=metadata, progress=lambda _: None)
    (folder / VIT).write_bytes(graph.SerializeToString())


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_session_and_its_work_take_what_is_foretold_and_give_it_back(
    dtype: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    visual, batch = checkpoint.config.visual, 3
    write_tower(checkpoint, tmp_path, dtype)
    session, work = session_bytes(visual, dtype, "cpu"), workspace_bytes(visual, dtype, batch, "cpu")
    for release in (False, True) if dtype in RELEASED else (False,):
        peak, after, closed = measured(tmp_path / VIT, json.dumps(asdict(visual)), batch, release)
        assert abs(peak - (session + work)) < TOLERANCE
        assert closed < CODE if release else abs(after - session) < TOLERANCE
        assert after < CODE if release else closed < CODE


def measured(*arguments: object) -> list[int]:
    """Growth in bytes: at the most, after two runs, after closing."""
    words = [str(int(word) if isinstance(word, bool) else word) for word in arguments]
    command = [sys.executable, "-c", PROGRAM, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    found: list[int] = json.loads(done.stdout)
    return found


def test_the_published_tower_has_its_weights_counted_one_by_one() -> None:
    config = Config.from_dict(CONFIG)
    tables = ("positional_embedding", "query", "pos_embed")
    shapes = expected_tensors(config, decoder=False)
    products = [shape for name, shape in shapes.items() if len(shape) == 2 and not name.endswith(tables)]
    folded = 4096 * 4096  # the projection of the queries
    assert parameters(config.visual) == sum(rows * columns for rows, columns in products) - folded


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_narrower_weights_take_less_and_more_images_take_more(device: str) -> None:
    visual = Config.from_dict(CONFIG).visual
    sessions = [session_bytes(visual, dtype, device) for dtype in DTYPES]
    assert sessions == sorted(sessions, reverse=True) and sessions[0] > 4 * sessions[-1]
    for dtype in DTYPES:
        works = [workspace_bytes(visual, dtype, batch, device) for batch in (1, 2, 4)]
        assert works == sorted(works) and works[2] > 1.5 * works[0]
