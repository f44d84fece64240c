"""The vision tower in OpenVINO: as exact as the export allows, and refused where it cannot be had."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_vit import GOLDEN, golden_images

from export.parity import LIMITS, Difference
from export.part import export_vit
from qvl_edge import Runtime
from qvl_edge.bundle import MANIFEST, VIT
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config
from qvl_edge.demo import SMALL_MODEL
from qvl_edge.engine.budget import estimate, remedies
from qvl_edge.errors import ConfigError
from qvl_edge.load import plan_for
from qvl_edge.options import LoadOptions
from qvl_edge.published import CONFIG
from qvl_edge.vision.encoder import VisionEncoder

CHECKPOINT = Checkpoint(GOLDEN / "tiny-long" / "checkpoint")
VISUAL = CHECKPOINT.config.visual
installed = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs the extra openvino")


@installed
@pytest.mark.parametrize("dtype", LIMITS)
def test_the_features_are_within_the_limits_of_the_export(dtype: str, tmp_path: Path) -> None:
    export_vit(CHECKPOINT, tmp_path, dtype=dtype)
    encoder = VisionEncoder(tmp_path / VIT, VISUAL, device="openvino", max_batch=2)
    pixels, expected = golden_images("tiny-long")
    pixels, expected = torch.cat([pixels] * 3)[:3], torch.cat([expected] * 3)[:3]
    found = encoder.encode(pixels)
    difference = Difference.of("features", found, expected, 0)
    assert difference.cosine_min >= LIMITS[dtype].cosine and difference.relative <= LIMITS[dtype].relative
    torch.testing.assert_close(encoder.encode(pixels[2:]), found[2:])
    assert encoder.encode(pixels[:0]).shape == (0, 256, 256)


@installed
@pytest.mark.parametrize(("level", "group"), [(4, 128), (0, 0)])
def test_activations_are_rounded_only_where_the_export_found_that_they_may_be(
    level: int, group: int, tmp_path: Path
) -> None:
    export_vit(CHECKPOINT, tmp_path, dtype="int8")
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["parts"]["vit"]["accuracy_level"] = level
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    session: Any = VisionEncoder(tmp_path / VIT, VISUAL, device="openvino")._session
    assert int(session._model.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) == group


@installed
@pytest.mark.parametrize("release", [False, True])
def test_a_question_about_a_picture_is_answered_as_on_onnxruntime(release: bool) -> None:
    scene = Path(__file__).parent.parent / "docs/images/answer.png"
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "release_vision": release}
    answers = [
        Runtime.from_pretrained(SMALL_MODEL, vision_device=place, **options).ask(scene, "What is here?").text
        for place in ("cpu", "openvino")
    ]
    assert answers[0] == answers[1] != ""


def test_without_the_package_the_error_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for refused in (
        lambda: VisionEncoder(tmp_path / VIT, VISUAL, device="openvino"),
        lambda: Runtime.from_pretrained(SMALL_MODEL, vision_device="openvino"),
    ):
        with pytest.raises(ConfigError, match=r"pip install 'qvl-edge\[openvino\]'"):
            refused()


def test_its_memory_is_in_the_plan_and_the_way_out_is_the_other_runtime() -> None:
    config, cpu = Config.from_dict(CONFIG), torch.device("cpu")
    asked = {"dtype": "bfloat16", "profile": "8g", "max_context": 2048, "max_memory": "40GB"}
    plans = {
        place: plan_for(config, LoadOptions.of(asked | {"vision_device": place}), cpu, cpu, None, lambda _: None)
        for place in ("cpu", "openvino")
    }
    budgets = {place: estimate(config, plan) for place, plan in plans.items()}
    assert budgets["openvino"].vision > 2 * budgets["cpu"].vision
    between = (budgets["cpu"].total + budgets["openvino"].total) // 2
    assert "--vision-device cpu" in list(remedies(config, plans["openvino"], between))
