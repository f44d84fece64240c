"""The key-value cache: allocated once, a batch of sequences each at its own position."""

import torch

from qvl_edge.config import Config
from qvl_edge.errors import PromptError


class KVCache:
    """Keys and values of every layer, and how much of each sequence is filled.

    k, v (layers, B, H, capacity, D) in `dtype`, a head's positions one after another; lengths (B,) int64 on the device.
    """

    def __init__(
        self, config: Config, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        shape = (config.num_hidden_layers, batch, config.num_attention_heads, capacity, config.kv_channels)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.ntk_alpha = torch.ones(batch, dtype=torch.float32, device=device)  # chosen at prefill and kept

    @property
    def capacity(self) -> int:
        """Positions a sequence can hold."""
        return self.k.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return self.k.nbytes + self.v.nbytes

    def sequence(self, index: int) -> "KVCache":
        """A view on one sequence of the batch, to prefill it alone."""
        view = object.__new__(KVCache)
        view.k, view.v = self.k[:, index : index + 1], self.v[:, index : index + 1]
        view.lengths, view.ntk_alpha = self.lengths[index : index + 1], self.ntk_alpha[index : index + 1]
        return view

    def check_room(self, tokens: int) -> None:
        """PromptError if `tokens` more do not fit into every sequence."""
        longest = int(self.lengths.max())
        if longest + tokens > self.capacity:
            raise PromptError(
                f"the cache holds {self.capacity} positions, {longest} are filled and {tokens} more were asked for; "
                "shorten the prompt or raise max_context"
            )
