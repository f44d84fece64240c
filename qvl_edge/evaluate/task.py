"""What an evaluation is made of: items and predictions, the metrics they give, and the task that ties them together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qvl_edge.errors import QvlError
from qvl_edge.text.prompt import Prompt

CHAT = {"do_sample": False, "max_new_tokens": 512}  # max_new_tokens of Qwen-VL-Chat's generation_config.json


class QualityDataError(QvlError, ValueError):
    """A data file that is not in its task's format: names file, line and field, and what was expected."""


@dataclass(frozen=True)
class Item:
    """One prompt of a task, and what its answer is compared with.

    content: the prompt's texts and images (paths) in order; markup in a text opens nothing. Without `options` an answer
    is generated; with them each is scored as a continuation of the prompt, and the likeliest is the answer. With
    `prompt`, which then takes the place of content, nothing is answered: its tokens in the spans `scored` are.
    """

    id: str  # unique in its file
    content: tuple[str | Path, ...]
    reference: Any = None  # JSON values, as the task's scorer takes them
    options: tuple[str, ...] = ()
    group: str = ""  # is also averaged separately: a subtask, a language, a split
    unit: str = ""  # items of one unit are right together or not at all (circular evaluation, MME's pairs)
    prompt: Prompt | None = None
    scored: Sequence[tuple[int, int]] = ()  # (first index, end) of the tokens that count

    @property
    def images(self) -> list[Path]:
        """The images of the prompt, in order."""
        return [part for part in self.content if isinstance(part, Path)]

    @property
    def text(self) -> str:
        """The prompt for people: an image shows as <img>NAME</img>."""
        return "".join(f"<img>{part.name}</img>" if isinstance(part, Path) else part for part in self.content)


@dataclass(frozen=True)
class Prediction:
    """A model's answer to an item."""

    id: str
    text: str  # generated, or the chosen option
    choice: int | None = None  # index of the likeliest option
    logprobs: tuple[float, ...] = ()  # summed natural log-probability of each option, or of the tokens that count

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Prediction":
        """Reads a line of a file of predictions."""
        return cls(values["id"], values["text"], values["choice"], tuple(values["logprobs"]))


@dataclass(frozen=True)
class Metric:
    """A score of every unit of the data: of an item, or of items that count together. Higher is better.

    The metric is `scale` times the mean, weighted by `weights` if given.
    """

    name: str
    values: Sequence[float]
    units: Sequence[str]  # an id for each value, the same for every model
    items: Sequence[Sequence[str]]  # ids of the items behind each value
    groups: Sequence[str] = ()  # of each value, where the task averages groups separately
    scale: float = 100.0
    weights: Sequence[float] = ()
    # "perplexity": values are log-probabilities per token; shown is exp(-mean), and of two models the ratio
    shown: Literal["mean", "perplexity"] = "mean"


def by_item(name: str, items: Sequence[Item], values: Sequence[float]) -> Metric:
    """The metric whose units are the items."""
    ids, groups = [item.id for item in items], [item.group for item in items]
    return Metric(name, values, ids, [[one] for one in ids], groups if any(groups) else ())


def by_unit(name: str, units: Sequence[Sequence[Item]], values: Sequence[float]) -> Metric:
    """The metric whose units are items that count together."""
    ids, groups = [[item.id for item in items] for items in units], [items[0].group for items in units]
    return Metric(name, values, [items[0].unit for items in units], ids, groups if any(groups) else ())


Scorer = Callable[[Sequence[Item], Mapping[str, Prediction]], list[Metric]]
"""Items and their predictions by id (all are there) -> the task's metrics, the main one first."""


@dataclass(frozen=True)
class Task:
    """An evaluation as published.

    read(file, images) returns the items of a file; relative image names start from `images`, or from the file's own
    folder if it is None. QualityDataError names file, line and field. (Perplexity's takes a tokenizer too.)
    """

    name: str
    title: str
    read: Callable[..., list[Item]]
    score: Scorer
    source: str  # of prompt, decoding and scoring rule
    chat_format: Literal["raw", "chatml"] = "raw"
    generation: Mapping[str, Any] = field(default_factory=dict)  # GenerationOptions; greedy if empty
    totals: Callable[[Sequence[Metric]], dict[str, float]] | None = None  # figures that are not means, as MME's sums
    # one request per line for a judge model, where no rule can score the answers (judge.py)
    requests: Callable[[Sequence[Item], Mapping[str, Prediction]], list[dict[str, Any]]] | None = None
