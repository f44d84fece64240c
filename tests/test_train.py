"""Training the small model: batches hold what the scenes show, and a stopped run resumes."""

import json
from pathlib import Path

import pytest
import torch

import qvl_edge.demo
from benchmarks.small_model.batches import IGNORE, BatchBuilder, cell_targets
from benchmarks.small_model.train import Trainer, answer_loss, learning_rate, sine_cosine_positions
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.demo.scenes import COLOURS, GRID, make_scene
from qvl_edge.model.cache import KVCache
from qvl_edge.model.loading import check_tensors, load_decoder, load_visual
from qvl_edge.text.prompt import chat_prompt
from qvl_edge.text.tokenizer import Tokenizer
from qvl_edge.vision.image import to_pixels

pytestmark = pytest.mark.slow

CHECKPOINT = Path(qvl_edge.demo.__file__).parent / "checkpoint"
TOLERANCE = 1e-4  # float32, sums in another order


@pytest.fixture(scope="module")
def builder() -> BatchBuilder:
    return BatchBuilder(Tokenizer.from_file(CHECKPOINT / "qwen.tiktoken"))


def test_the_prefix_is_the_runtimes_prompt(builder: BatchBuilder) -> None:
    for pictures in (1, 2):
        ids, starts = builder.prefix(pictures)
        query = [*({"image": "x"} for _ in range(pictures)), {"text": "Find the red circle."}]
        prompt = chat_prompt(
            builder.tokenizer, query, [], "You are a helpful assistant.", max_window_size=6144, markup_images=False
        )
        assert prompt.ids[: len(ids)] == ids and prompt.image_starts == starts


def test_cell_targets_cover_each_shape_and_digit() -> None:
    scenes = [make_scene(seed) for seed in range(20)]
    targets = cell_targets(scenes)
    for index, scene in enumerate(scenes):
        cells = sum((s.cells[2] - s.cells[0]) * (s.cells[3] - s.cells[1]) for s in scene.shapes)
        assert int((targets.colour[index] > 0).sum()) == cells
        assert int(targets.centre[index].sum()) == len(scene.shapes)
        for shape in scene.shapes:
            cell = shape.cells[1] * GRID + shape.cells[0]
            assert list(COLOURS)[int(targets.colour[index, cell]) - 1] == shape.colour
            assert tuple(targets.edges[index, cell].tolist()) == shape.cells
        digits = targets.digit[index][targets.digit[index] > 0] - 1
        assert "".join(map(str, digits.tolist())) == (scene.number or "")
        assert targets.place[index][targets.place[index] > 0].tolist() == [1, 2, 3][: len(scene.number or "")]


@torch.inference_mode()
def test_packed_branches_give_the_loss_of_separate_conversations(builder: BatchBuilder) -> None:
    checkpoint = Checkpoint(CHECKPOINT)
    model, visual = (load(checkpoint, dtype=torch.float32) for load in (load_decoder, load_visual))
    batch = builder.build(5, size=1, budget=400)
    features = visual(to_pixels([scene.image for scene in batch.scenes], 448))
    packed = answer_loss(model, batch, features)
    prefix = batch.image_starts[0] + 257
    # a branch begins where the positions start again
    edges = [i for i in range(prefix, batch.ids.shape[1]) if batch.positions[0, i] == prefix]
    assert len(edges) > 1
    total = weight = 0.0
    for start, end in zip(edges, [*edges[1:], batch.ids.shape[1]], strict=True):
        ids = torch.cat((batch.ids[:, :prefix], batch.ids[:, start:end]), dim=1)
        embeds = model.embed(ids)
        embeds[:, batch.image_starts[0] : batch.image_starts[0] + 256] = features
        cache = KVCache(model.config, 1, ids.shape[1], dtype=torch.float32)
        chances = model(embeds, cache, all_logits=True)[0].log_softmax(-1)
        for at in range(start, end):
            label, share = int(batch.labels[0, at]), float(batch.weights[0, at])
            if label != IGNORE:
                total -= share * float(chances[prefix + at - start - 1, label])
                weight += share
    assert float(packed) == pytest.approx(total / weight, abs=TOLERANCE)


def test_the_position_table_is_the_written_formula() -> None:
    table = sine_cosine_positions(16, 4)
    row, column, k = 2, 3, 1
    assert float(table[row * 4 + column, k]) == pytest.approx(torch.tensor(column / 10000 ** (k / 4)).sin().item())
    assert float(table[row * 4 + column, 12 + k]) == pytest.approx(torch.tensor(row / 10000 ** (k / 4)).cos().item())


def test_a_stopped_run_resumes_and_writes_a_checkpoint_in_the_published_layout(tmp_path: Path) -> None:
    source = CHECKPOINT / "qwen.tiktoken"
    Trainer(source, tmp_path, {"vision": 1, "joint": 0}).run()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (state["stage"], state["step"]) == (2, 0)
    check_tensors(Checkpoint(tmp_path / "checkpoint"))
    # as if stopped in the second stage
    torch.save(state | {"stage": 1}, tmp_path / "state.pt")
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"stage": "joi')  # a kill can cut a line short
    resumed = Trainer(source, tmp_path, {"vision": 1, "joint": 1})
    before = resumed.model.lm_head.weight.clone()
    resumed.run()
    assert not torch.equal(resumed.model.lm_head.weight, before)
    assert (tmp_path / "loss.png").stat().st_size > 0
    assert not list(tmp_path.glob("*.partial")) and json.loads((tmp_path / "checkpoint/config.json").read_text())


def test_denormals_are_zero_during_training_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny() -> float:
        return float(torch.full((64,), 1e-310, dtype=torch.float64).mul(1.0)[0])

    seen: list[float] = []
    monkeypatch.setattr(Trainer, "_train_step", lambda _: seen.append(tiny()) or {})
    Trainer(CHECKPOINT / "qwen.tiktoken", tmp_path, {"vision": 1, "joint": 0}).run()
    assert seen == [0.0] and tiny() > 0


def test_training_can_begin_with_the_weights_of_a_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(CHECKPOINT / "qwen.tiktoken", tmp_path, {"vision": 1, "joint": 4}, start=(CHECKPOINT, 3))
    assert (trainer.STAGES[trainer.stage], trainer.step) == ("joint", 3)
    source = Checkpoint(CHECKPOINT)
    assert torch.equal(trainer.model.lm_head.weight, source["lm_head.weight"].float())
    assert torch.equal(trainer.visual.proj, source["transformer.visual.proj"].float())
    # the warm-up starts where the optimizers do
    rates = [learning_rate(step, 100, peak=1.0, warmup=2, decay=0.5, fresh=trainer.fresh) for step in (3, 4, 75)]
    assert rates == [0.5, 1.0, 0.5]


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(tmp_path: Path) -> None:
    trainer = Trainer(CHECKPOINT / "qwen.tiktoken", tmp_path, {"vision": 1, "joint": 4}, start=(CHECKPOINT, 3))
    adamw, muon = trainer.optimizers
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, torch.optim.Muon)
    assert muon.defaults["adjust_lr_fn"] == "match_rms_adamw"  # the learning rates are AdamW's

    def trained(optimizer: torch.optim.Optimizer) -> list[int]:
        return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]

    others = ("bias", "ln_1.weight", "ln_2.weight")
    blocks = trainer.model.transformer.h.named_parameters()
    assert set(trained(muon)) == {id(parameter) for name, parameter in blocks if not name.endswith(others)}
    every = [id(parameter) for parameter in trainer.modules.parameters() if parameter.requires_grad]
    assert sorted(trained(adamw) + trained(muon)) == sorted(every)
