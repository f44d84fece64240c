import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from torch import Tensor

from qvl_edge import Runtime
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.evaluate.perplexity import PERPLEXITY, read_passages
from qvl_edge.evaluate.predict import Predictor
from qvl_edge.evaluate.report import Scored, rows
from qvl_edge.evaluate.task import Item, Prediction, QualityDataError
from qvl_edge.model.cache import KVCache
from qvl_edge.model.loading import load_decoder
from qvl_edge.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # nats a token, as the golden logits agree; pictures here are as the original tower sees them
TEXT = "Grün ist die Wiese, 蓝色的天空, and nobody asked for more than that. " * 12
SYSTEM = "You are a helpful assistant."


@pytest.fixture(scope="module")
def runtime(vit_cache: Path) -> Runtime:
    return Runtime.from_pretrained(GOLDEN / "tiny-a/checkpoint", cache_dir=vit_cache)


@pytest.fixture(scope="module")
def runtime_of_128(vit_cache: Path) -> Runtime:
    """With a seq_length of 128: NTK and log-n are at work in longer passages."""
    return Runtime.from_pretrained(GOLDEN / "tiny-long/checkpoint", cache_dir=vit_cache)


def losses(runtime: Runtime, passages: Sequence[Item]) -> list[float]:
    """The sum of -log p over the tokens of each passage that count."""
    predictor = Predictor(runtime, chat_format=PERPLEXITY.chat_format, generation=PERPLEXITY.generation)
    return [-one.logprobs[0] for one in predictor.predict(passages)]


@torch.inference_mode()
def losses_by_hand(checkpoint: Path, ids: list[int], pictures: dict[int, Tensor]) -> Tensor:
    """-log p of every id but the first, from one forward pass over all of them, with pictures from their first slot."""
    source = Checkpoint(checkpoint)
    model = load_decoder(source, dtype=torch.float32)
    embeds = source["transformer.wte.weight"][torch.tensor(ids)].float()
    for start, features in pictures.items():
        embeds[start : start + 256] = features
    cache = KVCache(source.config, 1, len(ids), dtype=torch.float32)
    chances = model(embeds[None], cache, all_logits=True)[0].double().log_softmax(-1)
    return -chances[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def test_answers_and_their_ends_count_as_in_one_forward_over_the_conversation(runtime: Runtime, tmp_path: Path) -> None:
    images = GOLDEN / "tiny-a/images"
    names = ("scene0_RGB.png", "scene2_L.png")
    asked = [f"Picture {n}:<img>{images / name}</img>\nWhat is it?" for n, name in enumerate(names, 1)]
    answered = ["A <ref>circle</ref><box>(12,34),(560,780)</box>.", "灰色"]
    turns = [{"from": who, "value": text} for pair in zip(asked, answered, strict=True)
             for who, text in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"conversations": turns}] * 2))

    tokenizer, features = runtime.tokenizer, np.load(GOLDEN / "tiny-a/golden.npz")
    start, end, newline = tokenizer.specials["<|im_start|>"], tokenizer.specials["<|im_end|>"], tokenizer.encode("\n")
    slots = [tokenizer.specials["<img>"], *[tokenizer.specials["<imgpad>"]] * 256, tokenizer.specials["</img>"]]
    ids = [start, *tokenizer.encode("system"), *newline, *tokenizer.encode(SYSTEM), end, *newline]
    pictures, counted = {}, []
    for number, (name, answer) in enumerate(zip(names, answered, strict=True), 1):
        ids += [start, *tokenizer.encode("user"), *newline, *tokenizer.encode(f"Picture {number}:")]
        pictures[len(ids) + 1] = torch.from_numpy(features[f"vision/{name}"])
        ids += [*slots, *tokenizer.encode("\nWhat is it?"), end, *newline]
        ids += [start, *tokenizer.encode("assistant"), *newline]
        said = [*tokenizer.encode(answer), end]
        counted += range(len(ids), len(ids) + len(said))
        ids += [*said, *newline]
    by_hand = losses_by_hand(GOLDEN / "tiny-a/checkpoint", ids, pictures)
    expected = float(by_hand[torch.tensor(counted) - 1].sum())

    passages = read_passages(file, None, tokenizer=tokenizer)
    assert [passage.id for passage in passages] == ["entry 1", "entry 2"]
    for passage, found in zip(passages, losses(runtime, passages), strict=True):
        assert passage.reference["tokens"] == len(counted)  # also where the slot held the same conversation
        assert found == pytest.approx(expected, abs=TOLERANCE * len(counted))
    assert runtime.engine.slots.free == 1


@pytest.mark.parametrize("seqlen", [60, 300])
def test_windows_of_a_text_count_as_in_a_forward_over_each(
    runtime: Runtime, runtime_of_128: Runtime, tmp_path: Path, seqlen: int
) -> None:
    model, name = (runtime, "tiny-a") if seqlen == 60 else (runtime_of_128, "tiny-long")
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    ids = model.tokenizer.encode(TEXT)
    passages = read_passages(file, None, tokenizer=model.tokenizer, seqlen=seqlen)
    assert len(passages) == len(ids) // seqlen > 1
    for number in (0, len(passages) - 1):
        window = ids[number * seqlen : (number + 1) * seqlen]
        by_hand = losses_by_hand(GOLDEN / name / "checkpoint", window, {})
        (found,) = losses(model, [passages[number]])
        assert passages[number].reference["tokens"] == seqlen - 1
        assert found == pytest.approx(float(by_hand.sum()), abs=TOLERANCE * seqlen)


def test_perplexity_is_over_all_tokens_and_not_a_mean_of_passages() -> None:
    items = [Item(name, ("",), {"tokens": tokens}) for name, tokens in (("a", 1), ("b", 3))]
    predictions = {"a": Prediction("a", "", None, (-2.0,)), "b": Prediction("b", "", None, (-4.0,))}
    (row,) = rows(Scored.of(PERPLEXITY, items, predictions, {}), None)
    assert row["model"]["value"] == pytest.approx(np.exp(1.5))


def test_of_a_text_with_a_picture_only_the_text_counts(runtime: Runtime, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    picture = GOLDEN / "tiny-a/images/scene0_RGB.png"
    file.write_text(json.dumps({"text": f"See <img>{picture}</img> here"}))
    (passage,) = read_passages(file, None, tokenizer=runtime.tokenizer)
    before, after = runtime.tokenizer.encode("See "), runtime.tokenizer.encode(" here")
    assert passage.id == "line 1"
    assert passage.scored == [(1, len(before)), (len(before) + 258, len(before) + 258 + len(after))]
    assert passage.reference["tokens"] == len(before) - 1 + len(after) and losses(runtime, [passage])[0] > 0


def entry(*answers: str) -> dict[str, list[dict[str, str]]]:
    turns = [({"from": "user", "value": "Say it."}, {"from": "assistant", "value": answer}) for answer in answers]
    return {"conversations": [turn for pair in turns for turn in pair]}


def test_an_answer_that_is_cut_counts_as_far_as_it_goes(runtime: Runtime, tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "data.json", runtime.tokenizer
    file.write_text(json.dumps([entry("yes", "a long answer")]))
    (whole,) = read_passages(file, None, tokenizer=tokenizer)
    second, end = whole.scored[1]
    (cut,) = read_passages(file, None, tokenizer=tokenizer, seqlen=second + 3)
    assert cut.scored == [whole.scored[0], (second, second + 3)]
    (first,) = read_passages(file, None, tokenizer=tokenizer, seqlen=second)
    assert first.scored == whole.scored[:1] and first.reference["tokens"] == len(tokenizer.encode("yes")) + 1
    assert end - second == len(tokenizer.encode("a long answer")) + 1
    with pytest.raises(QualityDataError, match="no answer begins within the first 10 tokens"):
        read_passages(file, None, tokenizer=tokenizer, seqlen=10)


def test_a_text_shorter_than_a_window_is_refused_with_both_numbers(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abc")
    tokenizer = Tokenizer.from_file(GOLDEN / "tiny-a/checkpoint/qwen.tiktoken")
    with pytest.raises(QualityDataError, match=r"has 2 tokens and --seqlen is 2048"):
        read_passages(file, None, tokenizer=tokenizer)
