"""An exported vit.onnx in OpenVINO, which reads the file that onnxruntime reads.

Per image, two threads of an AMD EPYC with AVX-512 and bfloat16, OpenVINO 2026.4 beside onnxruntime 1.32, in seconds:
the published tower in int8 6.9 and 13.7; four blocks and the resampler in float32 2.3 and 2.5, float16 1.1 and 2.6,
int8 0.74 and 1.4, int4 1.3 and 2.6. It holds the weights twice or more (vision/memory.py).
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvl_edge.bundle import read_manifest
from qvl_edge.errors import ConfigError

NAME = "openvino"  # as a device to encode images on


def check_openvino() -> None:
    """ConfigError if the package is not installed."""
    if importlib.util.find_spec(NAME) is None:
        raise ConfigError(
            "images are to be encoded on 'openvino', and the package openvino is not installed: "
            "pip install 'qvl-edge[openvino]', or use 'cpu'"
        )


class OpenVinoTower:
    """A vision tower compiled for one image at a time, whose buffers then are those of one."""

    def __init__(self, path: Path, dtype: str, image_size: int):
        """path: of vit.onnx, whose external data the caller has checked. RuntimeError if OpenVINO cannot read it.

        dtype: the export's. Towers in less than float32 compute in bfloat16 where the CPU does. Activations are rounded
        to int8 exactly where the export's comparison allowed it (export/precision.py: accuracy_level).
        """
        import openvino

        core = openvino.Core()
        vit: dict[str, Any] = read_manifest(path.parent).get("vit", {})
        bfloat16 = dtype != "float32" and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        model = core.read_model(path)
        model.reshape({"pixels": [1, 3, image_size, image_size]})
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": vit["block_size"] if vit.get("accuracy_level") else 0,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
        }
        self._model = core.compile_model(model, "CPU", {name: str(value) for name, value in settings.items()})

    def run(self, pixels: Tensor, features: Tensor) -> None:
        """Encode pixels (B, 3, S, S) float32 on the CPU into `features`. Several threads may call at once."""
        import openvino

        request = self._model.create_infer_request()
        for image, found in zip(pixels.contiguous().split(1), features.split(1), strict=True):
            request.set_output_tensor(openvino.Tensor(found.numpy(), shared_memory=True))
            request.infer([image.numpy()], share_inputs=True)
