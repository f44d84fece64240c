"""The key-value cache: views share what they show, and int8 keeps answers."""

from pathlib import Path

import pytest
import torch
from conftest import SMALL

import qvl_edge.demo
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config
from qvl_edge.errors import PromptError
from qvl_edge.model.cache import KVCache
from qvl_edge.model.loading import load_decoder

CONFIG = Config.from_dict(SMALL)
# relative norm error of logits with an int8 cache: rounding a key or value to steps of 1 / 127 of its row's largest
# number moves it by 0.5 % of its norm; attention averages over positions, and 0.15 to 0.3 % of the logits was seen
TOLERANCE = 0.01


def test_int8_takes_a_byte_a_number_and_two_a_row() -> None:
    half, small = (KVCache(CONFIG, 3, 10, dtype=dtype, block=5) for dtype in (torch.float16, torch.int8))
    rows = 2 * CONFIG.num_hidden_layers * 3 * CONFIG.num_attention_heads * 10
    assert half.nbytes == rows * CONFIG.kv_channels * 2
    assert small.nbytes == rows * (CONFIG.kv_channels + 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_a_sequence_and_a_window_are_views(dtype: torch.dtype) -> None:
    cache = KVCache(CONFIG, 3, 10, dtype=dtype)
    one = cache.sequence(1)
    one.advance(4)
    one.k[0, 0, 0, 3] = 1
    one.locks += 5
    assert cache.lengths.tolist() == cache.filled.tolist() == [0, 4, 0]
    assert cache.k[0, 1, 0, 3].tolist() == [1] * CONFIG.kv_channels
    assert cache.locks.tolist() == [0] * 2 + [5] * 2 + [0] * 2
    window = cache.window(6)
    window.advance(1)
    assert (window.capacity, cache.capacity) == (6, 10) and cache.window(99).capacity == 10
    assert cache.lengths.tolist() == cache.filled.tolist() == [1, 5, 1]
    cache.clear()
    assert one.filled.tolist() == window.lengths.tolist()[:1] == [0]


def test_room_is_counted_on_the_host_for_the_fullest_sequence() -> None:
    cache = KVCache(CONFIG, 2, 10, dtype=torch.float32)
    cache.sequence(1).advance(7)
    cache.check_room(3)
    cache.sequence(0).check_room(10)
    with pytest.raises(PromptError, match="holds 10 positions, 7 are filled and 4 more"):
        cache.check_room(4)


@torch.inference_mode()
def test_an_int8_cache_keeps_what_the_small_model_says() -> None:
    model = load_decoder(Checkpoint(Path(qvl_edge.demo.__file__).parent / "checkpoint"), dtype=torch.float32)
    ids = torch.randint(0, 300, (1, 60), generator=torch.Generator().manual_seed(0))
    logits = []
    for dtype, block in ((torch.float32, 0), (torch.int8, 0), (torch.int8, 16)):
        cache = KVCache(model.config, 1, 60, dtype=dtype, block=block)
        parts = [model(model.embed(part), cache, all_logits=True)[0] for part in ids.split([40, 1, 1, 18], dim=1)]
        logits.append(torch.cat(parts))
    exact, *smaller = logits
    best = exact.topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.5  # of a logit: the second is more than 1.6 times less likely
    assert int(clear.sum()) > 30
    for small in smaller:
        assert float((small - exact).norm() / exact.norm()) < TOLERANCE
        assert torch.equal(small.argmax(1)[clear], exact.argmax(1)[clear])
