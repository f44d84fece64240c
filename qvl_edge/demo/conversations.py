"""Scenes as conversations in Qwen-VL's fine-tuning format: calibration data for the small model."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from qvl_edge.demo.scenes import KINDS, Scene, ask, make_scene


def write_conversations(folder: Path, first_seed: int, count: int) -> Path:
    """`count` scenes with several questions each: PNG files and conversations.json, whose path is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for seed in range(first_seed, first_seed + count):
        scene = make_scene(seed)
        name = f"scene-{seed}.png"
        scene.image.save(folder / name)
        entries.append({"id": f"scene-{seed}", "conversations": _turns(scene, name, np.random.default_rng(seed))})
    path = folder / "conversations.json"
    path.write_text(json.dumps(entries, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def _turns(scene: Scene, image: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for kind in rng.permutation(KINDS[:-1]):
        question = ask(scene, str(kind), ("en", "zh")[int(rng.integers(2))], rng)
        if question is not None:
            text = question.text if turns else f"Picture 1:<img>{image}</img>\n{question.text}"
            turns += [{"from": "user", "value": text}, {"from": "assistant", "value": question.answer}]
    return turns
