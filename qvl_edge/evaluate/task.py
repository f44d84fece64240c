"""A task: how its file is read, how it is asked, and how answers are scored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qvl_edge.errors import QvlError
from qvl_edge.evaluate.item import Item, Prediction


@dataclass(frozen=True)
class Metric:
    """A score of every unit of the data: of an item, or of the items that count together. More is better.

    The metric is `scale` times the mean, weighted by `weights` if given. `items` says which items make a unit, for
    showing the worst.
    """

    name: str
    values: Sequence[float]
    units: Sequence[str]  # an id for each value, the same for every model
    items: Sequence[Sequence[str]]  # ids of the items behind each value
    groups: Sequence[str] = ()  # of each value, where the task averages groups apart
    scale: float = 100.0
    weights: Sequence[float] = ()
    # "perplexity": values are log-probabilities of a token; shown is exp(-mean), and of two models the quotient
    shown: Literal["mean", "perplexity"] = "mean"


Scorer = Callable[[Sequence[Item], Mapping[str, Prediction]], list[Metric]]
"""Items and their predictions by id (all are there) -> the task's metrics, the one that counts first."""


@dataclass(frozen=True)
class Task:
    """An evaluation as published.

    read(file, images) gives the items of a file, images being the folder that relative names start from (the file's own
    folder if None); QualityDataError names file, line and field. source: where prompt, decoding and rule come from.
    """

    name: str
    title: str
    read: Callable[[Path, Path | None], list[Item]]
    score: Scorer
    source: str
    chat_format: Literal["raw", "chatml"] = "raw"
    generation: Mapping[str, Any] = field(default_factory=dict)  # options of GenerationOptions; greedy if empty
    totals: Callable[[Sequence[Metric]], dict[str, float]] | None = None  # figures that are no mean, as MME's sums
    # what a judge is asked about the answers, one request a line, where no rule can score them; see quality.judge
    requests: Callable[[Sequence[Item], Mapping[str, Prediction]], list[dict[str, Any]]] | None = None


class QualityDataError(QvlError, ValueError):
    """A data file that is not in its task's format: says file, line and field, and what was expected."""


def by_item(name: str, items: Sequence[Item], values: Sequence[float], *, scale: float = 100.0) -> Metric:
    """The metric whose units are the items."""
    ids = [item.id for item in items]
    groups = [item.group for item in items]
    return Metric(name, values, ids, [[one] for one in ids], groups if any(groups) else (), scale)
