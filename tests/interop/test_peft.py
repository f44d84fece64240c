"""Adapters that PEFT writes are merged here as PEFT merges them. Needs the environment of `make test-interop`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import write_small_checkpoint
from safetensors.torch import load_file, save_file

from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.lora import LoraCheckpoint
from qvl_edge.model.decoder import QWenLMHeadModel
from qvl_edge.model.loading import load_decoder, load_visual

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.interop

TOLERANCE = 1e-6  # relative, float32 on both sides: W + scale * B @ A in another order
TARGETS = ["c_attn", "attn.c_proj", "w1", "w2"]  # of Qwen-VL's finetune.py
CASES: dict[str, dict[str, Any]] = {
    "finetune.py": {},
    "finetune.py on the base model": {"modules_to_save": ["wte", "lm_head"]},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"mlp.w1": 2}, "alpha_pattern": {r"h\.1\.attn\.c_proj": 3}},
    "a regular expression": {"target_modules": r"transformer\.h\.\d+\.mlp\.(w1|w2|c_proj)"},
    "the vision tower too": {"target_modules": [*TARGETS, "c_fc", "mlp.c_proj"]},
    "biases": {"bias": "all"},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "h"},
    "fan_in_fan_out": {"fan_in_fan_out": True},  # which PEFT turns off for nn.Linear
}


def whole_model(checkpoint: Checkpoint) -> QWenLMHeadModel:
    """Decoder and tower in float32 as one module with the checkpoint's names, as upstream's model is."""
    model = load_decoder(checkpoint, dtype=torch.float32)
    model.transformer.visual = load_visual(checkpoint, dtype=torch.float32)
    # what PEFT asks of any model
    model.config = SimpleNamespace(to_dict=dict, model_type="qwen")  # type: ignore[assignment]
    model.prepare_inputs_for_generation = lambda: None  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("case", CASES)
def test_merged_tensors_are_those_of_merge_and_unload(case: str, safe: bool, tmp_path: Path) -> None:
    folder = write_small_checkpoint(tmp_path / "base")
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    options = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "task_type": "CAUSAL_LM", "bias": "none"}
    settings = peft.LoraConfig(**options | CASES[case])
    model = peft.get_peft_model(whole_model(Checkpoint(folder)), settings)
    generator = torch.Generator().manual_seed(2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(tmp_path / "adapter", safe_serialization=safe)
    expected = model.merge_and_unload().state_dict()

    found = LoraCheckpoint(folder, tmp_path / "adapter")
    assert set(found.names) == set(expected)
    changed = set()
    for name in found.names:
        assert float((found[name] - expected[name]).norm()) <= TOLERANCE * float(expected[name].norm()), name
        if not torch.equal(found[name], tensors[name]):
            changed.add(name)
    assert len(changed) == len({name.split(".lora_")[0] for name in _written(tmp_path / "adapter")})
    assert any(name.startswith(VISUAL) for name in changed) == (case in ("the vision tower too", "biases"))


def _written(adapter: Path) -> list[str]:
    """Names of the tensors that PEFT saved."""
    file = adapter / "adapter_model.safetensors"
    return list(load_file(file) if file.exists() else torch.load(adapter / "adapter_model.bin", weights_only=True))
