"""The decoder against the original model's logits, and against itself: cached and batched decoding change nothing."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, GOLDEN_MODELS, write_small_checkpoint
from torch import Tensor

from qvl_edge.checkpoint import Checkpoint
from qvl_edge.engine.engine import Engine
from qvl_edge.engine.request import Request
from qvl_edge.engine.slots import Slots
from qvl_edge.errors import PromptError
from qvl_edge.model.cache import KVCache
from qvl_edge.model.decoder import QWenLMHeadModel, logn_scale, ntk_alpha
from qvl_edge.model.loading import load_decoder
from qvl_edge.options import GenerationOptions

TOLERANCE = 1e-4  # absolute, on logits of about ±5: both sides are float32 with sums in another order


@pytest.fixture(scope="module", params=GOLDEN_MODELS)
def golden_model(request) -> tuple[str, QWenLMHeadModel]:
    return request.param, load_decoder(Checkpoint(GOLDEN / request.param / "checkpoint"), dtype=torch.float32)


def golden_request(name: str, model: QWenLMHeadModel, case: int) -> tuple[np.lib.npyio.NpzFile, Request]:
    """The golden file and the prompt, the golden vision features at their slots."""
    golden = np.load(GOLDEN / name / "golden.npz")
    ids = golden[f"case{case}/input_ids"].tolist()
    text = json.loads((GOLDEN / name / "cases.json").read_text())[case]["raw_text"]
    images = [part.split("</img>")[0] for part in text.split("<img>")[1:]]
    starts = [index + 1 for index, token in enumerate(ids) if token == model.config.visual.image_start_id]
    features = [torch.from_numpy(golden[f"vision/{image}"]) for image in images]
    request = Request.of_ids(ids, GenerationOptions(do_sample=False))
    request.set_features(starts, images, features)
    return golden, request


def golden_prompt(name: str, model: QWenLMHeadModel, case: int) -> tuple[np.lib.npyio.NpzFile, Tensor]:
    """The golden file and the prompt's embeddings."""
    golden, request = golden_request(name, model, case)
    return golden, request.embed(model, 0, len(request.ids))


@torch.inference_mode()
@pytest.mark.parametrize("case", range(4))
def test_prefill_logits_equal_the_original_models(golden_model, case: int) -> None:
    name, model = golden_model
    golden, embeds = golden_prompt(name, model, case)
    length = embeds.shape[1]
    logits = model(embeds, KVCache(model.config, 1, length, dtype=torch.float32), all_logits=True)[0].numpy()
    np.testing.assert_allclose(logits[-1], golden[f"case{case}/prefill_logits_last"], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(logits[::37], golden[f"case{case}/prefill_logits_some"], atol=TOLERANCE, rtol=0)
    last = model(embeds, KVCache(model.config, 1, length, dtype=torch.float32))[0].numpy()
    np.testing.assert_allclose(last, logits[-1], atol=TOLERANCE, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("case", range(4))
def test_greedy_tokens_and_decode_logits_equal_the_original_models(golden_model, case: int) -> None:
    name, model = golden_model
    golden, embeds = golden_prompt(name, model, case)
    expected = golden[f"case{case}/greedy_ids"].tolist()
    cache = KVCache(model.config, 1, embeds.shape[1] + len(expected), dtype=torch.float32)
    logits, tokens, steps = model(embeds, cache), [], []
    for _ in expected:
        tokens.append(int(logits.argmax()))
        logits = model(model.embed(torch.tensor([[tokens[-1]]])), cache)
        steps.append(logits[0].numpy())
    assert tokens == expected
    np.testing.assert_allclose(
        steps[::4][: len(golden[f"case{case}/decode_logits"])],
        golden[f"case{case}/decode_logits"],
        atol=TOLERANCE,
        rtol=0,
    )


@torch.inference_mode()
def test_cached_decode_equals_one_full_forward(golden_model) -> None:
    name, model = golden_model
    _, embeds = golden_prompt(name, model, 1)
    length, pieces = embeds.shape[1], (1, 1, 3, 7)
    # the NTK alpha is kept from the first pass: pieces stay in the bucket of the whole, as a chat's turns do
    assert ntk_alpha(length - sum(pieces), model.config.seq_length) == ntk_alpha(length, model.config.seq_length)
    expected = model(embeds, KVCache(model.config, 1, length, dtype=torch.float32), all_logits=True)[0]
    cache = KVCache(model.config, 1, length, dtype=torch.float32)
    at = length - sum(pieces)
    rows = [model(embeds[:, :at], cache, all_logits=True)[0]]
    for piece in pieces:
        rows.append(model(embeds[:, at : at + piece], cache, all_logits=True)[0])
        at += piece
    torch.testing.assert_close(torch.cat(rows), expected, atol=TOLERANCE, rtol=0)


def test_a_batch_of_unequal_sequences_equals_single_runs_token_for_token(golden_model) -> None:
    name, model = golden_model
    limits = [5, 20, 12]

    def tokens_of(cases: list[int], stops: frozenset[int] = frozenset()) -> list[list[int]]:
        requests = [golden_request(name, model, case)[1] for case in cases]
        for request, case in zip(requests, cases, strict=True):
            request.room, request.stop_ids = limits[case], stops
        room = max(len(request.ids) + request.room for request in requests)
        assert all(
            request.error is None for request in Engine(Slots(model, capacity=room, count=len(cases))).run(requests)
        )
        return [request.token_ids for request in requests]

    assert len({len(golden_request(name, model, case)[1].ids) for case in range(3)}) == 3
    single = [tokens_of([case])[0] for case in range(3)]
    assert tokens_of([0, 1, 2]) == single
    golden = np.load(GOLDEN / name / "golden.npz")
    assert single == [golden[f"case{case}/greedy_ids"].tolist()[: limits[case]] for case in range(3)]
    # one that stops early leaves the others as they were
    stop = frozenset({single[1][3]})
    assert tokens_of([0, 1, 2], stop) == [tokens_of([case], stop)[0] for case in range(3)]


def test_a_full_cache_says_how_full_it_is(golden_model) -> None:
    _, model = golden_model
    cache = KVCache(model.config, 1, 4, dtype=torch.float32)
    with pytest.raises(PromptError, match="holds 4 positions, 0 are filled and 5 more"):
        model(torch.zeros(1, 5, model.config.hidden_size), cache)


@pytest.mark.parametrize(("length", "alpha"), [(1, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7), (8192, 7)])
def test_ntk_alpha_steps_at_powers_of_two_times_seq_length(length: int, alpha: int) -> None:
    assert ntk_alpha(length, 2048) == alpha


def test_logn_scales_positions_past_seq_length_only() -> None:
    config = Checkpoint(GOLDEN / "tiny-a/checkpoint").config
    positions = torch.tensor([[0, 2046, 2047, 2048, 8191]])
    expected = [1.0, 1.0, 1.0, math.log(2049, 2048), math.log(8192, 2048)]
    torch.testing.assert_close(logn_scale(config, positions)[0], torch.tensor(expected))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_small_checkpoint(tmp_path / "checkpoint"))
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    logits = []
    for kind in (torch.float32, dtype):
        model = load_decoder(checkpoint, dtype=kind)
        logits.append(model(model.embed(ids), KVCache(model.config, 1, 40, dtype=kind))[0])
    # 8 bits of mantissa in bfloat16, a few roundings in a row
    bound = {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert float((logits[1] - logits[0]).norm() / logits[0].norm()) < bound
