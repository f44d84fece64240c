"""One thing to ask a model, and what it said."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Item:
    """One prompt of a task, and what its answer is compared with.

    content: the prompt's texts and images (paths) in order; what a text says never opens anything. Without `options`
    an answer is generated; with them each is scored as the continuation of the prompt, and the likeliest is the answer.
    """

    id: str  # unique in its file
    content: tuple[str | Path, ...]
    reference: Any = None  # JSON values, as the task's scorer takes them
    options: tuple[str, ...] = ()
    group: str = ""  # what is also averaged apart: a subtask, a language, a split
    unit: str = ""  # items of one unit are right together or not at all (circular evaluation, MME's pairs)

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
    """What a model made of an item: the generated text, or the index of the likeliest option."""

    id: str
    text: str  # generated, or the option chosen
    choice: int | None = None
    logprobs: tuple[float, ...] = ()  # summed log-probability of each option, natural

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Prediction":
        """What to_dict gave."""
        return cls(values["id"], values["text"], values["choice"], tuple(values["logprobs"]))
