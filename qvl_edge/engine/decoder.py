"""What the engine needs of a decoder: `QWenLMHeadModel` on any device, and `FusedDecoder`."""

from typing import Protocol

import torch
from torch import Tensor

from qvl_edge.config import Config
from qvl_edge.model.cache import KVCache


class Decoder(Protocol):
    """Embeds ids, and appends embeddings to a cache for logits."""

    config: Config

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def embeddings_device(self) -> torch.device: ...
    def embed(self, ids: Tensor) -> Tensor: ...
    def __call__(self, embeds: Tensor, cache: KVCache, *, all_logits: bool = False) -> Tensor: ...
