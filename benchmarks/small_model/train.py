"""Train the small model that ships: python -m benchmarks.small_model.train QWEN_TIKTOKEN FOLDER

Two stages, because joint training from scratch does not get past guessing digits:
1. the vision tower alone, against what each grid cell shows;
2. decoder and vision together, a dozen questions per picture packed behind one copy of its 256 features, vision at a
   quarter of the learning rate.
FOLDER receives state.pt (training resumes from it), log.jsonl, loss.png and, at every save, checkpoint/ in the
published layout. QWEN_TIKTOKEN is the published qwen.tiktoken, whose first ranks become the vocabulary. Needs torch 2.9
or newer, for Muon.
"""

import contextlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plot import loss as loss_chart
from benchmarks.report import command, say
from benchmarks.small_model.batches import (
    COORDINATES,
    IGNORE,
    Batch,
    BatchBuilder,
    CellTargets,
    cell_targets,
)
from kernels import rotate
from qvl_edge import plot
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config
from qvl_edge.demo import SMALL_MODEL
from qvl_edge.demo.scenes import COLOURS, MAX_DIGITS, SHAPES, SIZE, make_scene
from qvl_edge.files import append_jsonl, copy_file, read_jsonl, replacing, write_jsonl, write_tensors
from qvl_edge.model.decoder import QWenLMHeadModel, rotary_tables
from qvl_edge.model.loading import load_decoder, load_visual
from qvl_edge.model.vit import VisionTransformer
from qvl_edge.text.tokenizer import SPECIALS, VOCAB_FILE, Tokenizer
from qvl_edge.vision.image import to_pixels

SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")  # copied from SMALL_MODEL
CONFIG = Config.from_folder(SMALL_MODEL)
RANKS = CONFIG.visual.image_start_id + 3 - len(SPECIALS)  # entries of qwen.tiktoken that the small model keeps
WIDTH = CONFIG.hidden_size
BATCH_VISION, BATCH_JOINT, BUDGET = 16, 4, 480  # pictures per step of either stage, question tokens per picture
SAVE_EVERY = 100  # steps
RATES: dict[str, dict[str, Any]] = {
    "vision": {"peak": 1.5e-3, "warmup": 50, "decay": 0.5},
    "joint": {"peak": 1.5e-3, "warmup": 100, "decay": 0.4},
}


def sine_cosine_positions(width: int, grid: int) -> Tensor:
    """The resampler's fixed position table (grid², width): first columns, then rows (visual.py)."""
    frequencies = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")

    def axis(coordinates: Tensor) -> Tensor:
        angles = coordinates.reshape(-1, 1).double() * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    return torch.cat((axis(columns), axis(rows)), dim=1).float()


def initialize(model: QWenLMHeadModel, visual: VisionTransformer) -> None:
    """Random weights, in place.

    The resampler starts position-aligned: q and k share one random orthogonal matrix, v and out are the identity, so a
    query attends mostly to its own cell. Otherwise the cell loss hardly moved in 400 steps.
    """
    depth = model.config.num_hidden_layers
    for name, parameter in [*model.named_parameters(), *visual.named_parameters()]:
        if parameter.dim() == 1:
            nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("wte.weight"):
            nn.init.normal_(parameter, std=0.1)
        else:
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, std=fan_in**-0.5 / (math.sqrt(2 * depth) if "c_proj" in name else 1))
    pool = visual.attn_pool
    with torch.no_grad():
        # learned; from random values it had found columns but not rows after 600 steps
        visual.positional_embedding.copy_(sine_cosine_positions(visual.positional_embedding.shape[1], 16))
        pool.pos_embed.copy_(sine_cosine_positions(pool.pos_embed.shape[1], 16))
        pool.query.normal_(std=0.02)
        aligned = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0] * 4.0
        pool.attn.in_proj_weight.copy_(torch.cat((aligned, aligned, torch.eye(WIDTH))))
        pool.attn.out_proj.weight.copy_(torch.eye(WIDTH))
        pool.ln_q.weight.fill_(0.02)
        pool.ln_kv.weight.fill_(0.2)


class CellReader(nn.Module):
    """Linear probes of the features, for training only."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (len(COLOURS) + 1, len(SHAPES) + 1, 11, 2, *[COORDINATES] * 4, MAX_DIGITS + 1)
        self.read = nn.Linear(WIDTH, sum(self.sizes))

    def forward(self, features: Tensor, targets: CellTargets) -> tuple[Tensor, float]:
        """The cell loss, and the share of shapes' cells whose box is exact."""
        colour, shape, digit, centre, *edges, place = self.read(features).split(self.sizes, dim=-1)
        classes = {"colour": colour, "shape": shape, "digit": digit, "centre": centre, "place": place}
        loss = features.new_zeros(())
        for name, logits in classes.items():
            target = getattr(targets, name).flatten()
            # most cells are empty: the others weigh as much as all of these together
            each = F.cross_entropy(logits.flatten(0, 1), target, reduction="none")
            some = target > 0
            loss = loss + each[~some].mean() + (each[some].mean() if bool(some.any()) else 0.0)
        covered = targets.colour > 0
        exact = torch.ones(int(covered.sum()), dtype=torch.bool)
        for index, logits in enumerate(edges):
            wanted = targets.edges[..., index][covered]
            loss = loss + F.cross_entropy(logits[covered], wanted)
            exact &= logits[covered].argmax(-1) == wanted
        return loss, float(exact.float().mean())


def vision_step(seed: int, visual: VisionTransformer, reader: CellReader) -> dict[str, Any]:
    """Forward and backward of stage 1; figures for the log."""
    scenes = [make_scene(seed * BATCH_VISION + index) for index in range(BATCH_VISION)]
    loss, exact = reader(visual(to_pixels([scene.image for scene in scenes], SIZE)), cell_targets(scenes))
    loss.backward()
    return {"cells": loss.item(), "exact": exact}


def answer_loss(model: QWenLMHeadModel, batch: Batch, features: Tensor) -> Tensor:
    """Weighted mean cross-entropy of the answer tokens. features (pictures, 256, hidden)."""
    config = model.config
    x = model.embed(batch.ids)
    per_row = features.view(len(batch.ids), -1, *features.shape[1:])
    pieces, at = [], 0
    for index, start in enumerate(batch.image_starts):
        pieces += [x[:, at:start], per_row[:, index]]
        at = start + features.shape[1]
    x = torch.cat([*pieces, x[:, at:]], dim=1)
    cos, sin = rotary_tables(config, batch.positions, torch.ones(len(x)))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=batch.attention).transpose(1, 2)

    for block in model.transformer.h:
        x = block(x, attend)
    # a token predicts the next one; that of a branch's last token begins another branch, and has no label
    following = batch.labels.roll(-1, dims=1)
    following[:, -1] = IGNORE
    answers = following != IGNORE
    logits = model.lm_head(model.transformer.ln_f(x[answers]))
    each = F.cross_entropy(logits, following[answers], reduction="none")
    weights = batch.weights.roll(-1, dims=1)[answers]
    return (each * weights).sum() / weights.sum()


def alignment(features: Tensor, targets: CellTargets, words: list[tuple[str, Tensor]]) -> Tensor:
    """Cross-entropy of a cell's subject, shape and digit, classified by the nearest word embedding.

    words: target of CellTargets, embeddings (classes, hidden). Aligning "red" with red cells helps attention find them:
    without it, questions for a colour stayed at chance for 800 steps.
    """
    loss = features.new_zeros(())
    for name, names in words:
        target = getattr(targets, name)
        shown = target > 0
        if bool(shown.any()):
            seen = F.normalize(features[shown], dim=-1)
            loss = loss + F.cross_entropy(10 * seen @ F.normalize(names, dim=-1).T, target[shown] - 1)
    return loss


def joint_step(
    seed: int, builder: BatchBuilder, model: QWenLMHeadModel, visual: VisionTransformer, reader: CellReader
) -> dict[str, Any]:
    """Forward and backward of stage 2; every eighth batch is about two pictures."""
    two = seed % 8 == 7
    half = 2 if two else 1
    batch = builder.build(seed, size=BATCH_JOINT // half, budget=BUDGET // half, pictures=1 + two)
    features = visual(to_pixels([scene.image for scene in batch.scenes], SIZE))
    answers = answer_loss(model, batch, features)
    targets = cell_targets(batch.scenes)
    cells, exact = reader(features, targets)
    aligned = alignment(features, targets, [(name, model.embed(ids)) for name, ids in builder.words])
    (answers + 0.1 * cells + 0.1 * aligned).backward()
    figures = {"two" if two else "answers": answers.item(), "cells": cells.item(), "exact": exact}
    return figures | {"aligned": aligned.item()}


def write_checkpoint(folder: Path, model: QWenLMHeadModel, visual: VisionTransformer) -> None:
    """Settings and float16 safetensors in the published layout."""
    for name in SETTINGS:
        copy_file(SMALL_MODEL / name, folder / name)
    tensors = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    tensors |= {f"transformer.visual.{name}": value.half().contiguous() for name, value in visual.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors)


def learning_rate(step: int, steps: int, *, peak: float, warmup: int, decay: float, fresh: int = 0) -> float:
    """Linear warm-up from step `fresh` on, then `peak`, then linearly down to zero over the last share `decay`."""
    return peak * min(1.0, (step - fresh + 1) / warmup, (1 - step / steps) / decay)


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """Flush denormals to zero: optimizer moments decay into them, and they are slow on x86."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)  # the default; torch has no getter


class Trainer:
    """The training itself: modules, optimizers and progress."""

    STAGES = ("vision", "joint")

    def __init__(
        self, tiktoken_file: Path, folder: Path, steps: dict[str, int], *, start: tuple[Path, int] | None = None
    ):
        """Resume `folder`, or begin: at random, or with `start`, a checkpoint and a step of the joint stage."""
        torch.manual_seed(0)
        self.folder, self.steps = folder, steps
        checkpoint = folder / "checkpoint"
        checkpoint.mkdir(parents=True, exist_ok=True)
        lines = tiktoken_file.read_bytes().splitlines(keepends=True)
        (checkpoint / VOCAB_FILE).write_bytes(b"".join(lines[:RANKS]))
        self.builder = BatchBuilder(Tokenizer.from_file(checkpoint / VOCAB_FILE))
        self.model, self.visual, self.reader = QWenLMHeadModel(CONFIG), VisionTransformer(CONFIG.visual), CellReader()
        initialize(self.model, self.visual)
        self.modules = nn.ModuleDict({"model": self.model, "visual": self.visual, "reader": self.reader})
        self.stage, self.step, self.fresh = 0, 0, 0  # fresh: the step at which the optimizers were new
        state = folder / "state.pt"
        saved = torch.load(state, weights_only=True) if state.exists() else None
        if saved is not None:
            self.stage, self.step, self.fresh = saved["stage"], saved["step"], saved["fresh"]
            self.modules.load_state_dict(saved["modules"])
        elif start is not None:
            weights, step = start
            source = Checkpoint(weights)
            self.model.load_state_dict(load_decoder(source, dtype=torch.float32).state_dict())
            self.visual.load_state_dict(load_visual(source, dtype=torch.float32).state_dict())
            self.stage, self.step, self.fresh = self.STAGES.index("joint"), step, step
        self.optimizers = self._new_optimizers()
        if saved is not None:
            for optimizer, content in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(content)
        self._cut_log()  # also creates it

    def _cut_log(self) -> None:
        """Drop the rows that a stopped run logged after its last save: those steps are repeated."""
        log = self.folder / "log.jsonl"
        rows = [row for _, row in read_jsonl(log, resuming=True)]
        here = (self.stage, self.step)
        kept = {at: row for row in rows if (at := (self.STAGES.index(row["stage"]), row["step"])) <= here}
        write_jsonl(log, kept.values())

    def _new_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW, and in the second stage Muon for the matrices of the decoder's blocks."""
        sight = [p for module in (self.visual, self.reader) for p in module.parameters() if p.requires_grad]
        if self.STAGES[self.stage] == "vision":
            return [torch.optim.AdamW([{"params": sight, "scale": 1.0}], betas=(0.9, 0.98), weight_decay=0.02)]
        blocks = [p for p in self.model.transformer.h.parameters() if p.dim() == 2]
        in_blocks = {id(p) for p in blocks}
        rest = [p for p in self.model.parameters() if id(p) not in in_blocks]
        groups = [{"params": sight, "scale": 0.25}, {"params": rest, "scale": 1.0}]
        muon = torch.optim.Muon(blocks, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")  # updates of AdamW's size
        muon.param_groups[0]["scale"] = 1.0
        return [torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.05), muon]

    def _train_step(self) -> dict[str, Any]:
        name = self.STAGES[self.stage]
        rate = learning_rate(self.step, self.steps[name], fresh=self.fresh, **RATES[name])
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group in groups:
            group["lr"] = rate * group["scale"]
        self.modules.zero_grad(set_to_none=True)
        if name == "vision":
            figures = vision_step(self.step, self.visual, self.reader)
        else:
            figures = joint_step(self.step, self.builder, self.model, self.visual, self.reader)
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return figures

    def save(self) -> None:
        """Write state.pt, checkpoint/ and loss.png."""
        state = {"stage": self.stage, "step": self.step, "fresh": self.fresh, "modules": self.modules.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        with replacing(self.folder / "state.pt") as partial:
            torch.save(state, partial)
        write_checkpoint(self.folder / "checkpoint", self.model, self.visual)
        with plot.optional():
            plot.save(loss_chart(self.folder / "log.jsonl"), self.folder / "loss.png")

    @flushed_denormals()
    def run(self) -> None:
        """Train to the end of the last stage; log every 20 steps, save every SAVE_EVERY."""
        while self.stage < len(self.STAGES):
            name = self.STAGES[self.stage]
            recent = defaultdict[str, list[float]](list)
            began, first = time.perf_counter(), self.step
            while self.step < self.steps[name]:
                for key, value in self._train_step().items():
                    recent[key].append(value)
                self.step += 1
                if self.step % 20 == 0:
                    seconds = (time.perf_counter() - began) / (self.step - first)
                    means = {key: round(sum(values) / len(values), 4) for key, values in recent.items()}
                    row = {"stage": name, "step": self.step, "s/step": round(seconds, 3), **means}
                    append_jsonl(self.folder / "log.jsonl", [row])
                    left = seconds * (self.steps[name] - self.step) / 60
                    say(f"{json.dumps(row)} {left:.0f} min left in this stage")
                    recent.clear()
                if self.step % SAVE_EVERY == 0:
                    self.save()
            self.stage, self.step, self.fresh = self.stage + 1, 0, 0
            if self.stage < len(self.STAGES):
                self.optimizers = self._new_optimizers()
            self.save()


def main() -> None:
    parser = command("small_model.train", __doc__)
    parser.add_argument("tiktoken", type=Path, metavar="QWEN_TIKTOKEN")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vision-steps", type=int, default=1200)
    parser.add_argument("--joint-steps", type=int, default=7500)
    parser.add_argument("--weights", type=Path, metavar="CHECKPOINT", help="start the joint stage with these weights")
    parser.add_argument("--from-step", type=int, default=0, help="first joint step, with --weights (default: 0)")
    args = parser.parse_args()
    start = None if args.weights is None else (args.weights, args.from_step)
    Trainer(args.tiktoken, args.folder, {"vision": args.vision_steps, "joint": args.joint_steps}, start=start).run()


if __name__ == "__main__":
    main()
