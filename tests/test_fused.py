"""The fused int4 decoder against the one in torch, its kernels interpreted (or on a GPU where there is one)."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SMALL, write_small_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantize.job import quantize_checkpoint
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config, QuantConfig
from qvl_edge.engine.engine import Engine
from qvl_edge.engine.request import Request
from qvl_edge.engine.slots import Slots
from qvl_edge.errors import CheckpointError, ConfigError
from qvl_edge.model.cache import KVCache
from qvl_edge.model.decoder import QWenLMHeadModel
from qvl_edge.model.fused import FusedDecoder
from qvl_edge.model.loading import load_decoder, load_fused
from qvl_edge.options import GenerationOptions
from qvl_edge.text.conversations import read_samples
from qvl_edge.text.tokenizer import Tokenizer

pytest.importorskip("triton", reason="needs the triton package, which Linux has")

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# relative norm error of float16 logits against float32 ones: each of two blocks rounds 7 activations and, for a prompt,
# 4 weights; embeddings, the last norm and the logits are 3 more. 25 roundings of 2^-11 / sqrt(3) at most give 1.4e-3
TOLERANCE = 1.4e-3
# an int8 cache: half a step of 127 in keys and values, which moves the logits of this random model by a per cent
TOLERANCE_INT8 = 2e-2
SHAPE = {
    "hidden_size": 128,  # the interpreter takes a second a token with 256
    "num_attention_heads": 1,
    "kv_channels": 128,
}


@pytest.fixture(
    scope="module",
    params=[
        {"seq_length": 2048, "quant": QuantConfig(group_size=128)},
        # dynamic NTK and log-n from the first tokens on, other groups, channels in the order of activations
        {"seq_length": 16, "quant": QuantConfig(group_size=32, sym=False)},
    ],
    ids=["g128", "g32-zeros-long"],
)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, ...]:
    """An int4 checkpoint, its decoder in torch (float32) and the fused one (float16)."""
    folder = tmp_path_factory.mktemp("fused")
    path = write_small_checkpoint(folder / "checkpoint", seq_length=request.param["seq_length"], **SHAPE)
    quantize_checkpoint(Checkpoint(path), folder / "bundle", request.param["quant"], None)
    checkpoint = Checkpoint(folder / "bundle")
    return (
        checkpoint,
        load_decoder(checkpoint, dtype=torch.float32),
        load_fused(checkpoint, dtype=torch.float16, device=DEVICE),
    )


GREEDY = GenerationOptions(do_sample=False)


def ids_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (1, count), generator=torch.Generator().manual_seed(seed))


def error(ours: Tensor, expected: Tensor) -> float:
    assert ours.shape == expected.shape and ours.dtype == torch.float32
    return float((ours.cpu() - expected).norm() / expected.norm())


def logits_of(model: QWenLMHeadModel | FusedDecoder, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """All logits (T, vocab) of ids that come in parts."""
    device = model.device
    cache = KVCache(model.config, 1, sum(part.shape[1] for part in parts), dtype=dtype, device=device)
    with torch.inference_mode():
        return torch.cat([model(model.embed(part.to(device)), cache, all_logits=True)[0] for part in parts])


@pytest.mark.parametrize("parts", [[21], [3, 1, 1], [1, 18]], ids=str)
def test_its_logits_are_those_of_the_decoder_in_torch(models, parts: list[int]) -> None:
    _, torch_model, fused = models
    ids = ids_of(sum(parts)).split(parts, dim=1)
    expected = logits_of(torch_model, ids, torch.float32)
    assert error(logits_of(fused, ids, torch.float16), expected) < TOLERANCE
    assert error(logits_of(fused, ids, torch.int8), expected) < TOLERANCE_INT8
    assert error(logits_of(torch_model, ids, torch.int8), expected) < TOLERANCE_INT8


def test_without_all_logits_only_the_last_position_is_computed(models) -> None:
    _, _, fused = models
    ids = ids_of(5).to(DEVICE)
    every = logits_of(fused, [ids], torch.float16)
    cache = KVCache(fused.config, 1, 5, dtype=torch.float16, device=DEVICE)
    assert torch.equal(fused(fused.embed(ids), cache)[0], every[-1])


def test_it_does_not_write_into_the_embeddings_it_is_given(models) -> None:
    _, _, fused = models
    embeds = fused.embed(ids_of(2).to(DEVICE))
    before = embeds.clone()
    fused(embeds, KVCache(fused.config, 1, 2, dtype=torch.float16, device=DEVICE))
    assert torch.equal(embeds, before)


def generated(model: QWenLMHeadModel | FusedDecoder, prompts: list[Tensor], options: GenerationOptions) -> list:
    requests = [
        Request.of_ids(prompt[0].tolist(), replace(options, max_new_tokens=count), device=model.device)
        for prompt, count in zip(prompts, (4, 2, 3), strict=False)
    ]
    assert all(request.error is None for request in Engine(Slots(model, capacity=30, count=len(prompts))).run(requests))
    return [request.token_ids for request in requests]


def test_a_batch_of_unequal_prompts_gives_each_the_tokens_of_the_decoder_in_torch(models) -> None:
    _, torch_model, fused = models
    prompts = [ids_of(count, seed=count) for count in (3, 1, 5)]
    together = generated(fused, prompts, GREEDY)
    assert [len(tokens) for tokens in together] == [4, 2, 3]
    # the random models' best two logits are further apart than float16 moves them
    assert together == generated(torch_model, prompts, GREEDY)


def test_a_seed_gives_a_sequence_the_same_tokens_alone_and_in_a_batch(models) -> None:
    _, _, fused = models
    prompts = [ids_of(count, seed=count) for count in (2, 3)]
    options = GenerationOptions(seed=5, temperature=0.7, top_p=0.9)
    together = generated(fused, prompts, options)
    assert generated(fused, prompts[1:], options)[0][:2] == together[1]


def test_the_int8_head_stays_close_and_takes_half_the_bytes(models) -> None:
    checkpoint, torch_model, fused = models
    small = load_fused(checkpoint, dtype=torch.float16, device=DEVICE, head="int8")
    expected = logits_of(torch_model, [ids_of(5)], torch.float32)
    # half a step of 127 in each weight of a row, of the size of its largest: sqrt(2 log 128) / 127 / sqrt(12)
    assert error(logits_of(small, [ids_of(5)], torch.float16), expected) < 1e-2
    assert small.lm_head.words.nbytes * 2 == fused.lm_head.nbytes


def test_desc_act_runs_in_the_order_of_activations(tmp_path: Path) -> None:
    path = write_small_checkpoint(tmp_path / "checkpoint", **SHAPE)
    samples = tmp_path / "lines.txt"
    samples.write_text("a line of text to calibrate with\n" * 4)

    tokenizer = Tokenizer.from_file(path / "qwen.tiktoken")
    quant = QuantConfig(group_size=64, desc_act=True)
    found = read_samples(samples, tokenizer, samples=4, seqlen=64, seed=0)
    quantize_checkpoint(Checkpoint(path), tmp_path / "bundle", quant, found)
    checkpoint = Checkpoint(tmp_path / "bundle")
    fused = load_fused(checkpoint, dtype=torch.float16, device=DEVICE)
    assert fused.blocks[0].w1_w2.weight.perm is not None
    for parts in ([18], [2, 1]):
        ids = ids_of(sum(parts)).split(parts, dim=1)
        expected = logits_of(load_decoder(checkpoint, dtype=torch.float32), ids, torch.float32)
        assert error(logits_of(fused, ids, torch.float16), expected) < TOLERANCE


def test_a_damaged_projection_is_named_with_its_checkpoint(models, tmp_path: Path) -> None:
    checkpoint, _, _ = models
    folder = shutil.copytree(checkpoint.path, tmp_path / "damaged")
    name = "transformer.h.1.mlp.w2"
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if f"{name}.g_idx" in tensors:
            tensors[f"{name}.g_idx"][0] = 99
            save_file(tensors, shard, metadata={"format": "pt"})
    for load in (load_decoder, partial(load_fused, device=DEVICE)):
        with pytest.raises(CheckpointError, match=rf"damaged: {name}.g_idx lies in \[0, 99\]"):
            load(Checkpoint(folder), dtype=torch.float16)


def test_a_random_decoder_has_the_shapes_of_its_config() -> None:
    config = Config.from_dict({**SMALL, **SHAPE, "num_hidden_layers": 1})
    fused = FusedDecoder.random(config, device=DEVICE, head="int8")
    logits = logits_of(fused, [ids_of(3)], torch.float16)
    assert logits.shape == (3, config.vocab_size) and bool(logits.isfinite().all())
    assert 0.1 < float(logits.std()) < 10  # inputs and outputs keep their size


def test_what_it_cannot_load_names_the_way_out(models, tmp_path: Path) -> None:
    checkpoint, _, _ = models
    with pytest.raises(ConfigError, match="dtype is torch.float32, the int4 kernels compute in torch.float16"):
        load_fused(checkpoint, dtype=torch.float32, device=DEVICE)
    with pytest.raises(ConfigError, match="head is 'int4', known are 'float16'"):
        load_fused(checkpoint, dtype=torch.float16, device=DEVICE, head="int4")  # type: ignore[arg-type]
    path = write_small_checkpoint(tmp_path / "float")
    with pytest.raises(ConfigError, match="is not GPTQ with 4 bits; make it so with:\n  python -m quantize.gptq"):
        load_fused(Checkpoint(path), dtype=torch.float16, device=DEVICE)
