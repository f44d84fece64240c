"""The exported vision tower opens and runs through optimum. Needs the environment of `make test-interop`."""

from pathlib import Path

import pytest
import torch
from conftest import write_small_checkpoint

from export.part import export_vit
from kernels.sessions import session_options
from quantize.job import quantize_checkpoint
from qvl_edge.bundle import VIT
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import QuantConfig
from qvl_edge.model.loading import load_visual
from qvl_edge.vision.encoder import VisionEncoder

modeling = pytest.importorskip("optimum.onnxruntime")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.interop

TOLERANCE = {
    "float32": 1e-4,
    "float16": 2e-2,
}  # absolute, on features of about ±4: sums in another order; float16 weights


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_exported_tower_gives_the_torch_features_through_optimum(tmp_path: Path, dtype: str) -> None:
    checkpoint = Checkpoint(write_small_checkpoint(tmp_path / "checkpoint"))
    tmp_path = tmp_path / "bundle"
    quantize_checkpoint(checkpoint, tmp_path, QuantConfig(), None)  # optimum looks for a config.json beside the graph
    export_vit(checkpoint, tmp_path, dtype=dtype)
    size = checkpoint.config.visual.image_size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = load_visual(checkpoint, dtype=torch.float32)(pixels)
    model = modeling.ORTModelForCustomTasks.from_pretrained(
        tmp_path,
        file_name=VIT,
        config=transformers.PretrainedConfig(),
        export=False,
        provider="CPUExecutionProvider",
        session_options=session_options(),  # the export's sessions have made the process's pool of threads
    )
    found = torch.as_tensor(model(pixels=pixels)["features"])
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(VisionEncoder(tmp_path / VIT, checkpoint.config.visual).encode(pixels), found)
