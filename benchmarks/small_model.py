"""What int4 costs the small model, on scenes it has never seen: python -m benchmarks.small_model

Rows: the checkpoint in float32, and its decoder in int4 by GPTQ and by rounding to nearest, both with the bundle's
default vision tower. Columns: the share of "find" answers whose box has IoU > 0.5 with the exact one, the share of
exact answers to the other kinds of question, each with its standard error, and the perplexity of exact answers.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import qvl_edge.demo
from benchmarks.machine import describe_machine
from export.part import export_vit
from quantize.calibration import read_samples
from quantize.job import quantize_checkpoint
from qvl_edge import Runtime
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import QuantConfig
from qvl_edge.demo.conversations import write_conversations
from qvl_edge.demo.scenes import KINDS, UNSEEN, Question, Scene, ask, ask_which, make_scene
from qvl_edge.engine.generate import generate
from qvl_edge.engine.inputs import Inputs
from qvl_edge.engine.options import GenerationOptions
from qvl_edge.engine.sampling import Sampler
from qvl_edge.engine.slots import Slots
from qvl_edge.text.boxes import parse_boxes
from qvl_edge.text.prompt import chat_prompt, decode_reply, stop_token_ids
from qvl_edge.text.tokenizer import VOCAB_FILE, Tokenizer

CHECKPOINT = Path(qvl_edge.demo.__file__).parent / "checkpoint"
TEST_SCENES = UNSEEN + 10**6  # first seed; calibration takes scenes from UNSEEN on
CALIBRATION_SCENES = 128
SYSTEM = "You are a helpful assistant."
BATCH = 16
LONGEST = 160  # tokens of an answer; the longest description has about 150
GOALS = ("find", "count", "read")  # asked about every scene, the other kinds about every third


@dataclass(frozen=True)
class Item:
    """A question with its pictures."""

    scenes: tuple[Scene, ...]
    question: Question
    scored: bool  # whether its exact answer counts for the perplexity


def make_items(count: int) -> list[Item]:
    """GOALS about each of `count` scenes, where it allows it, all kinds about every third; both languages in turn."""
    items = []
    for index in range(count):
        rng = np.random.default_rng(TEST_SCENES + index)
        scene = make_scene(TEST_SCENES + index)
        other = make_scene(TEST_SCENES + count + index)
        for number, kind in enumerate(KINDS):
            if index % 3 and kind not in GOALS:
                continue
            language = ("en", "zh")[(index + number) % 2]
            if kind == "which":
                scenes: tuple[Scene, ...] = (scene, other)
                question = ask_which((scene, other), language, rng)
            else:
                scenes, question = (scene,), ask(scene, kind, language, rng)
            if question is not None:
                items.append(Item(scenes, question, scored=index % 3 == 0))
    return items


def query_of(item: Item) -> list[dict[str, Any]]:
    """The item as Runtime takes it."""
    return [*({"image": scene.image} for scene in item.scenes), {"text": item.question.text}]


def answers(runtime: Runtime, items: list[Item]) -> Iterator[str]:
    """Greedy answers, BATCH at a time."""
    greedy = GenerationOptions(do_sample=False)
    stops = stop_token_ids(runtime.tokenizer, "chatml")
    slots = Slots(runtime.decoder, capacity=2048, count=BATCH)
    for first in range(0, len(items), BATCH):
        prompts = []
        for item in items[first : first + BATCH]:
            prompt = chat_prompt(
                runtime.tokenizer, query_of(item), [], SYSTEM, max_window_size=6144, markup_images=False
            )
            encoded = runtime.vision.encode([scene.image for scene in item.scenes])
            prompts.append(Inputs(prompt.ids, prompt.image_starts, encoded.keys, encoded.features))
        rows: list[list[int]] = [[] for _ in prompts]
        samplers = [Sampler(greedy, []) for _ in prompts]
        limits = [LONGEST] * len(prompts)
        for step in generate(slots, prompts, samplers, stop_ids=stops, max_new_tokens=limits):
            for row, token in zip(rows, step, strict=True):
                if token is not None:
                    row.append(token)
        for row in rows:
            yield decode_reply(runtime.tokenizer, row, "chatml")


def iou(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2."""
    width = max(0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0, min(one[3], other[3]) - max(one[1], other[1]))
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - width * height
    return width * height / area if area > 0 else 0.0


def is_right(item: Item, text: str) -> bool:
    """IoU > 0.5 of the first box for "find", the exact text otherwise."""
    if item.question.kind != "find" or item.question.target is None:
        return text == item.question.answer
    boxes = parse_boxes(text, image_sizes=[item.scenes[0].image.size])
    return bool(boxes) and iou(boxes[0].corners, item.question.target.box) > 0.5


def measure(name: str, runtime: Runtime, items: list[Item]) -> dict[str, Any]:
    """One row of the table."""
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    scores: list[float] = []
    for index, (item, text) in enumerate(zip(items, answers(runtime, items), strict=True)):
        right[item.question.kind].append(is_right(item, text))
        if item.scored:
            scores += runtime.score(query_of(item), item.question.answer, chat_format="chatml")
        if index % 50 == 0:
            print(f"{name}: {index} of {len(items)} questions", file=sys.stderr, flush=True)
    row: dict[str, Any] = {"model": name}
    for kind, found in right.items():
        share = sum(found) / len(found) if found else math.nan  # few scenes may show no number
        row[kind] = {
            "share": share,
            "standard_error": math.sqrt(share * (1 - share) / max(len(found), 1)),
            "n": len(found),
        }
    return row | {"perplexity": math.exp(-sum(scores) / len(scores)), "scored_tokens": len(scores)}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a markdown table."""
    head = ["model", *(f"{kind}{' IoU>0.5' if kind == 'find' else ''} (n={rows[0][kind]['n']})" for kind in KINDS)]
    lines = ["| " + " | ".join([*head, "perplexity"]) + " |", "|" + "---|" * (len(KINDS) + 2)]
    for row in rows:
        shares = (f"{row[kind]['share']:.1%} ± {row[kind]['standard_error']:.1%}" for kind in KINDS)
        lines.append("| " + " | ".join([row["model"], *shares, f"{row['perplexity']:.4f}"]) + " |")
    return "\n".join(lines)


def make_bundle(folder: Path, checkpoint: Checkpoint, calibration: Path | None, quant: QuantConfig) -> Path:
    """A bundle by GPTQ, or by rounding to nearest without `calibration`."""
    samples = None
    if calibration is not None:
        tokenizer = Tokenizer.from_file(checkpoint.path / VOCAB_FILE)
        samples = read_samples(calibration, tokenizer, samples=CALIBRATION_SCENES, seqlen=2048, seed=0)
    quantize_checkpoint(checkpoint, folder, quant, samples)
    export_vit(checkpoint, folder)
    return folder


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.small_model", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--only-float", action="store_true", help="the first row only")
    parser.add_argument("--json", type=Path, help="also write the figures, with machine and versions")
    args = parser.parse_args()
    checkpoint, items = Checkpoint(args.checkpoint), make_items(args.scenes)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows = [measure("float32", Runtime.from_pretrained(checkpoint.path, cache_dir=root / "cache"), items)]
        if not args.only_float:
            calibration = write_conversations(root / "calibration", UNSEEN, CALIBRATION_SCENES)
            quant = QuantConfig(group_size=args.group_size)
            for name, data in (("int4 GPTQ", calibration), ("int4 rounded to nearest", None)):
                bundle = make_bundle(root / name.replace(" ", "-"), checkpoint, data, quant)
                rows.append(measure(name, Runtime.from_pretrained(bundle), items))
    print(table(rows))
    if args.json:
        content = {"benchmark": "small_model", "scenes": args.scenes, **describe_machine(), "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
