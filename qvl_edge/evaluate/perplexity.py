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
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from qvl_edge import Runtime
from qvl_edge.config import IMAGE_TOKENS
from qvl_edge.engine.request import Request
from qvl_edge.evaluate.predict import answers
from qvl_edge.evaluate.task import Item, Metric, Prediction, QualityDataError, Task
from qvl_edge.text.conversations import Sample, read_samples
from qvl_edge.text.prompt import Prompt
from qvl_edge.text.tokenizer import IM_END, IM_START, Tokenizer


@dataclass(frozen=True)
class Passage:
    """Tokens that go through the model together. spans: (first index, end) of those that count."""

    id: str  # unique in its file
    sample: Sample
    spans: Sequence[tuple[int, int]]

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return sum(end - start for start, end in self.spans)

    def item(self, tokenizer: Tokenizer) -> Item:
        """The passage as an item; its reference is the number of tokens that count, and a hash of all."""
        ids = self.sample.ids
        digest = hashlib.sha256(str([ids, *self.spans]).encode()).hexdigest()
        return Item(self.id, (tokenizer.decode(ids),), {"tokens": self.tokens, "ids": digest})


def read_passages(file: Path, tokenizer: Tokenizer, *, seqlen: int = 2048, images: Path | None = None) -> list[Passage]:
    """The windows of a .txt file, or the entries of a .json or .jsonl file (text/conversations.py), cut at `seqlen`.

    QualityDataError or CalibrationError say what cannot be used.
    """
    if file.suffix == ".txt":
        return _windows(file, tokenizer, seqlen)
    samples = read_samples(file, tokenizer, samples=1 << 62, seqlen=seqlen, seed=0, images=images)
    passages = [Passage(one.where.removeprefix(f"{file} "), one, _spans(one, tokenizer)) for one in samples]
    passages = [passage for passage in passages if passage.spans]
    if not passages:
        raise QualityDataError(f"{file}: no answer begins within the first {seqlen} tokens; raise --seqlen")
    return passages


def _windows(file: Path, tokenizer: Tokenizer, seqlen: int) -> list[Passage]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise QualityDataError(f"{file} cannot be read as UTF-8 text: {error}") from None
    ids = tokenizer.encode(text, ())
    if not 2 <= seqlen <= len(ids):
        raise QualityDataError(
            f"{file} has {len(ids)} tokens and --seqlen is {seqlen}; give a longer text, or a window of 2 to {len(ids)}"
        )
    passages: list[Passage] = []
    for start in range(0, len(ids) - seqlen + 1, seqlen):
        name = f"window {len(passages) + 1}"
        sample = Sample(ids[start : start + seqlen], [], [], [], f"{file} {name}")
        passages.append(Passage(name, sample, [(1, seqlen)]))
    return passages


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


class PassagePredictor:
    """Scores passages: a prediction's log-probability is the sum over the tokens that count.

    The NTK alpha is that of the passage as a whole, as in training.
    """

    def __init__(self, runtime: Runtime, passages: Sequence[Passage]):
        self.runtime, self.passages = runtime, {passage.id: passage for passage in passages}

    def predict(self, items: Sequence[Item]) -> list[Prediction]:
        """Predictions in the items' order, starting with empty caches."""
        self.runtime.forget()
        asked = {self._request(self.passages[item.id]): item for item in items}
        sums = {item.id: math.fsum(request.scores) for item, request in answers(self.runtime, asked)}
        return [Prediction(item.id, "", None, (sums[item.id],)) for item in items]

    def _request(self, passage: Passage) -> Request:
        sample, end = passage.sample, passage.spans[-1][1]
        starts = [start for start in sample.image_starts if start < end]
        prompt = Prompt(sample.ids[:end], starts, sample.images[: len(starts)])
        return Request(prompt=prompt, scored=passage.spans)


def score(items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[Metric]:
    """Perplexity; the values are the mean natural log-probability per token of each passage."""
    ids, tokens = [item.id for item in items], [float(item.reference["tokens"]) for item in items]
    values = [predictions[one].logprobs[0] / count for one, count in zip(ids, tokens, strict=True)]
    items_of = [[one] for one in ids]
    return [Metric("perplexity", values, ids, items_of, scale=1.0, weights=tokens, shown="perplexity")]


def _needs_tokenizer(file: Path, images: Path | None) -> list[Item]:
    raise QualityDataError(f"{file}: passages depend on a tokenizer; use read_passages")


PERPLEXITY = Task(
    "perplexity",
    "Perplexity",
    _needs_tokenizer,
    score,
    source="text in windows as GPTQ's authors measure it (arXiv:2210.17323); the answers of conversations",
)
