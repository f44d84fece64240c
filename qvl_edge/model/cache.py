"""The key-value cache: allocated once, a batch of sequences each at its own position."""

import torch
from torch import Tensor

from qvl_edge.config import Config
from qvl_edge.errors import PromptError


class KVCache:
    """Keys and values of every layer, and how much of each sequence is filled.

    k, v (layers, B, H, capacity, D) in `dtype`, a head's positions one after another; for torch.int8 also k_scales,
    v_scales (layers, B, H, capacity) float16, otherwise None. With `block`, int8 lies in blocks of N positions:
    k (layers, B, blocks, H, D, N), v (layers, B, blocks, H, N, D), scales (layers, B, blocks, H, N).
    capacity: positions a sequence can hold. lengths (B,) int64 on the device, and filled (B,) int64, the same on the
    host, so that reading it does not wait for the device. locks (B * H,) int32: see AttentionArgs.
    """

    def __init__(
        self,
        config: Config,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        block: int = 0,
    ):
        layers, heads, dim = config.num_hidden_layers, config.num_attention_heads, config.kv_channels
        self.capacity = capacity
        self.block = block = min(block, capacity) if dtype == torch.int8 else 0
        scales_shape: tuple[int, ...] = (layers, batch, heads, capacity)
        k_shape = v_shape = (*scales_shape, dim)
        if self.block:
            blocks = (layers, batch, -(-capacity // self.block), heads)
            k_shape, v_shape, scales_shape = (*blocks, dim, block), (*blocks, block, dim), (*blocks, block)
        # not zeroed: on a CPU memory is taken as positions are filled, and nothing reads past those
        self.k = torch.empty(k_shape, dtype=dtype, device=device)
        self.v = torch.empty(v_shape, dtype=dtype, device=device)
        self.k_scales: Tensor | None = None
        self.v_scales: Tensor | None = None
        if dtype == torch.int8:  # zeroed, so that what is multiplied beside the last position is finite
            self.k_scales = torch.zeros(scales_shape, dtype=torch.float16, device=device)
            self.v_scales = torch.zeros(scales_shape, dtype=torch.float16, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.filled = torch.zeros(batch, dtype=torch.int64)
        self.placed = torch.zeros(batch, dtype=torch.bool)  # on the host: whether a sequence has its frequencies
        # radians per position (B, D), of the NTK alpha that is chosen at prefill and kept
        self.frequencies = torch.zeros(batch, config.kv_channels, dtype=torch.float32, device=device)
        self.locks = torch.zeros(batch * config.num_attention_heads, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, scales included."""
        return sum(t.nbytes for t in (self.k, self.v, self.k_scales, self.v_scales) if t is not None)

    def sequence(self, index: int) -> "KVCache":
        """A view on one sequence of the batch, to prefill it alone."""
        return self.sequences(index, index + 1)

    def sequences(self, first: int, end: int) -> "KVCache":
        """A view on sequences first to end - 1 of the batch."""
        heads = len(self.locks) // len(self.lengths)
        return self._view(slice(first, end), self.capacity, slice(first * heads, end * heads))

    def window(self, capacity: int) -> "KVCache":
        """A view on the first `capacity` positions of every sequence: attention splits its work by capacity."""
        return self._view(slice(None), min(capacity, self.capacity), slice(None))

    def _view(self, rows: slice, capacity: int, locks: slice) -> "KVCache":
        view = object.__new__(KVCache)
        view.capacity, view.block = capacity, self.block
        where = (slice(None), rows, *self._first(capacity))
        view.k, view.v = self.k[where], self.v[where]
        view.k_scales = None if self.k_scales is None else self.k_scales[where]
        view.v_scales = None if self.v_scales is None else self.v_scales[where]
        view.lengths, view.filled, view.frequencies = self.lengths[rows], self.filled[rows], self.frequencies[rows]
        view.placed, view.locks = self.placed[rows], self.locks[locks]
        return view

    def _first(self, positions: int) -> tuple[slice, ...]:
        """Where the first positions of a layer's sequence are, with the rest of their last block."""
        return (slice(-(-positions // self.block)),) if self.block else (slice(None), slice(positions))

    def copy(self, source: int, target: int, positions: int) -> None:
        """Copy the first `positions` keys and values of sequence `source` to `target`."""
        first = self._first(positions)
        for tensor in (self.k, self.v, self.k_scales, self.v_scales):
            if tensor is not None:
                for layer in tensor:  # one layer at a time: no temporary of a whole sequence's size
                    layer[target, *first] = layer[source, *first]

    def exchange(self, first: int, second: int, positions: int) -> None:
        """Each of two sequences, `positions` keys and values of both, in the other's place."""
        pair, crossed, where = [first, second], [second, first], self._first(positions)
        for tensor in (self.k, self.v, self.k_scales, self.v_scales):
            for layer in () if tensor is None else tensor:  # likewise
                kept = layer[first, *where].clone()
                layer[first, *where] = layer[second, *where]
                layer[second, *where] = kept
        for row in (self.lengths, self.filled, self.placed, self.frequencies):
            row[pair] = row[crossed]

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """One layer's k, v, k_scales and v_scales."""
        k_scales = None if self.k_scales is None else self.k_scales[index]
        v_scales = None if self.v_scales is None else self.v_scales[index]
        return self.k[index], self.v[index], k_scales, v_scales

    def advance(self, tokens: int) -> None:
        """Count `tokens` more in every sequence."""
        self.lengths += tokens
        self.filled += tokens

    def clear(self) -> None:
        """Forget all sequences."""
        self.lengths.zero_()
        self.filled.zero_()
        self.placed.zero_()

    def check_room(self, tokens: int) -> None:
        """PromptError if `tokens` more do not fit into every sequence."""
        longest = int(self.filled.max())
        if longest + tokens > self.capacity:
            raise PromptError(
                f"the cache holds {self.capacity} positions, {longest} are filled and {tokens} more were asked for; "
                "shorten the prompt or raise max_context"
            )
