"""What enters the decoder: token ids, and the features of pictures in their slots."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qvl_edge.engine.decoder import Decoder

Element = int | str
"""A token id, or the content key of the picture whose slot it is."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """One prompt.

    ids: its tokens. starts: index of the first slot of each picture. keys: content key of each picture; two pictures
    with one key have the same features. features: (slots, hidden) of each.
    """

    ids: Sequence[int]
    starts: Sequence[int] = ()
    keys: Sequence[str] = ()
    features: Sequence[Tensor] = ()
    elements: list[Element] = field(init=False)

    def __post_init__(self) -> None:
        elements: list[Element] = list(self.ids)
        for start, key, feature in zip(self.starts, self.keys, self.features, strict=True):
            elements[start : start + len(feature)] = [key] * len(feature)
        object.__setattr__(self, "elements", elements)

    def __len__(self) -> int:
        return len(self.ids)

    def embed(self, model: Decoder, first: int, end: int) -> Tensor:
        """Embeddings (1, end - first, hidden) of the positions first to end - 1."""
        embeds = model.embed(torch.tensor([self.ids[first:end]], device=model.device))
        for start, feature in zip(self.starts, self.features, strict=True):
            low, high = max(first, start), min(end, start + len(feature))
            if low < high:
                embeds[0, low - first : high - first] = feature[low - start : high - start].to(embeds)
        return embeds


def common_prefix(held: Sequence[Element], wanted: Sequence[Element]) -> int:
    """How many elements two prompts share from the first on."""
    for index, (one, other) in enumerate(zip(held, wanted, strict=False)):
        if one != other:
            return index
    return min(len(held), len(wanted))
