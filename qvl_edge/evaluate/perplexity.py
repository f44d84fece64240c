"""Perplexity of a text, or of the answers in conversations about images. It needs no labels.

A .txt file is cut into windows of `seqlen` tokens that do not overlap, as GPTQ's authors measure WikiText-2
(arXiv:2210.17323): all tokens of a window but the first count, and a shorter rest is left out. Of conversations in
Qwen-VL's fine-tuning format, .json or .jsonl, the assistant's words count, and the <|im_end|> after them:

    [{"conversations": [{"from": "user", "value": "Picture 1:<img>a.jpg</img>\\nWho?"},
                        {"from": "assistant", "value": "A boy."}]}]

How a text is cut depends on the tokenizer, so the reader takes one. Losses are kept per passage, so that two models can
be compared passage by passage.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from qvl_edge.config import IMAGE_TOKENS
from qvl_edge.evaluate.records import read_text
from qvl_edge.evaluate.task import Item, Metric, Prediction, QualityDataError, Task
from qvl_edge.text.conversations import Sample, read_samples
from qvl_edge.text.prompt import Prompt
from qvl_edge.text.tokenizer import IM_END, IM_START, Tokenizer


def read_passages(file: Path, images: Path | None, *, tokenizer: Tokenizer, seqlen: int = 2048) -> list[Item]:
    """The windows of a .txt file, or the entries of a .json or .jsonl file (text/conversations.py), cut at `seqlen`.

    QualityDataError or CalibrationError say what cannot be used.
    """
    if file.suffix == ".txt":
        return _windows(file, tokenizer, seqlen)
    samples = read_samples(file, tokenizer, samples=1 << 62, seqlen=seqlen, seed=0, images=images)
    passages = [
        _passage(sample.where.removeprefix(f"{file} "), sample, spans, tokenizer)
        for sample in samples
        if (spans := _spans(sample, tokenizer))
    ]
    if not passages:
        raise QualityDataError(f"{file}: no answer begins within the first {seqlen} tokens; raise --seqlen")
    return passages


def _windows(file: Path, tokenizer: Tokenizer, seqlen: int) -> list[Item]:
    ids = tokenizer.encode(read_text(file), ())
    if not 2 <= seqlen <= len(ids):
        raise QualityDataError(
            f"{file} has {len(ids)} tokens and --seqlen is {seqlen}; give a longer text, or a window of 2 to {len(ids)}"
        )
    windows = [ids[start : start + seqlen] for start in range(0, len(ids) - seqlen + 1, seqlen)]
    return [
        _passage(name, Sample(window, [], [], [], f"{file} {name}"), [(1, seqlen)], tokenizer)
        for name, window in ((f"window {number}", window) for number, window in enumerate(windows, 1))
    ]


def _passage(name: str, sample: Sample, spans: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> Item:
    """An item whose tokens in `spans` count; its reference is their number, and a hash of all tokens."""
    end = spans[-1][1]
    starts = [start for start in sample.image_starts if start < end]
    digest = hashlib.sha256(str([sample.ids, *spans]).encode()).hexdigest()
    return Item(
        name,
        (tokenizer.decode(sample.ids),),
        {"tokens": sum(last - first for first, last in spans), "ids": digest},
        prompt=Prompt(sample.ids[:end], starts, sample.images[: len(starts)]),
        scored=spans,
    )


def _spans(sample: Sample, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """The answers of a conversation; of a text, everything but its first token and its images."""
    ids, (begin, end) = sample.ids, (tokenizer.specials[token] for token in (IM_START, IM_END))
    if begin not in ids:  # a text: there it would be plain letters
        images = [(start - 1, start + IMAGE_TOKENS + 1) for start in sample.image_starts]
        edges = [(0, 1), *images, (len(ids), len(ids))]
        return [(after, before) for (_, after), (before, _) in pairwise(edges) if after < before]
    head = [begin, *tokenizer.encode("assistant"), *tokenizer.encode("\n")]
    starts = [index + len(head) for index in range(len(ids)) if ids[index : index + len(head)] == head]
    ends = [ids.index(end, start) + 1 if end in ids[start:] else len(ids) for start in starts]
    return [(first, last) for first, last in zip(starts, ends, strict=True) if first < last]


def score(items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[Metric]:
    """Perplexity; the values are the mean natural log-probability per token of each passage."""
    ids, tokens = [item.id for item in items], [float(item.reference["tokens"]) for item in items]
    values = [predictions[one].logprobs[0] / count for one, count in zip(ids, tokens, strict=True)]
    items_of = [[one] for one in ids]
    return [Metric("perplexity", values, ids, items_of, scale=1.0, weights=tokens, shown="perplexity")]


PERPLEXITY = Task(
    "perplexity",
    "Perplexity",
    read_passages,
    score,
    source="text in windows as GPTQ's authors measure it (arXiv:2210.17323); the answers of conversations",
)
