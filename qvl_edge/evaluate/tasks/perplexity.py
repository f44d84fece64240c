"""Perplexity as a task: of a text file, or of the answers in conversations; see qvl_edge.evaluate.perplexity.

It needs no labels. Two lines of such files, .txt and .json:

    The tower was built in 1889.
    [{"conversations": [{"from": "user", "value": "Picture 1:<img>a.jpg</img>\\nWho?"},
                        {"from": "assistant", "value": "A boy."}]}]

How a text falls into passages depends on the tokenizer, so the reader takes one.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from qvl_edge import Runtime
from qvl_edge.evaluate.item import Item, Prediction
from qvl_edge.evaluate.perplexity import Passage, loss, read_passages
from qvl_edge.evaluate.task import Metric, QualityDataError, Task
from qvl_edge.text.tokenizer import Tokenizer


class PassagePredictor:
    """Scores passages: a prediction's log-probability is the sum over a passage's tokens that count."""

    def __init__(self, runtime: Runtime, passages: Mapping[str, Passage]):
        self.runtime, self.passages = runtime, passages

    def predict(self, items: Sequence[Item]) -> list[Prediction]:
        """Predictions in the items' order."""
        found = [loss(self.runtime, self.passages[item.id]) for item in items]
        return [Prediction(one.id, "", None, (-one.nll,)) for one in found]


def read(file: Path, tokenizer: Tokenizer, *, seqlen: int) -> tuple[list[Item], dict[str, Passage]]:
    """(items, passages by id). An item's reference is its number of tokens that count, and a hash of all."""
    passages = {passage.id: passage for passage in read_passages(file, tokenizer, seqlen=seqlen)}
    items = []
    for passage in passages.values():
        ids = passage.sample.ids
        reference = {
            "tokens": sum(end - start for start, end in passage.spans),
            "ids": hashlib.sha256(str([ids, *passage.spans]).encode()).hexdigest(),
        }
        items.append(Item(passage.id, (tokenizer.decode(ids),), reference))
    return items, passages


def score(items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[Metric]:
    """Perplexity; the values are the mean natural log-probability of a token of each passage."""
    ids, tokens = [item.id for item in items], [float(item.reference["tokens"]) for item in items]
    values = [predictions[one].logprobs[0] / count for one, count in zip(ids, tokens, strict=True)]
    items_of = [[one] for one in ids]
    return [Metric("perplexity", values, ids, items_of, scale=1.0, weights=tokens, shown="perplexity")]


def _needs_tokenizer(file: Path, images: Path | None) -> list[Item]:
    raise QualityDataError(f"{file}: passages depend on a tokenizer; use tasks.perplexity.read")


PERPLEXITY = Task(
    "perplexity",
    "Perplexity",
    _needs_tokenizer,
    score,
    source="text in windows as GPTQ's authors measure it (arXiv:2210.17323); the answers of conversations",
)
