"""Shared fixtures: the golden checkpoints, and small random checkpoints in the published layout."""

import base64
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# before torch is loaded, and for the commands that tests start: GPTQ of the small model takes 1 s of one core, or 9 s
# of two that wait for one another (torch 2.13)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import save_file

if not torch.cuda.is_available():  # before triton is loaded: its kernels then run in its interpreter, on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")
    with contextlib.suppress(ImportError):
        import triton_interpreter  # noqa: F401

with contextlib.suppress(ImportError):  # the interop tests have an environment without it
    import hypothesis

    # the same examples in every run, and none kept in a folder
    hypothesis.settings.register_profile("tests", derandomize=True, database=None, deadline=None)
    hypothesis.settings.load_profile("tests")

from qvl_edge import vit_cache as vit_cache_module
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config
from qvl_edge.model.loading import expected_tensors
from qvl_edge.text.tokenizer import SPECIALS, Tokenizer

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden"
GOLDEN_MODELS = ("tiny-a", "tiny-long")

RANKS = 256  # the single bytes only
SMALL = {
    "model_type": "qwen",
    "hidden_size": 128,
    "intermediate_size": 512,
    "kv_channels": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "seq_length": 2048,
    "max_position_embeddings": 8192,
    "torch_dtype": "float16",
    "visual": {
        "heads": 2,
        "image_size": 56,
        "image_start_id": RANKS + len(SPECIALS) - 3,
        "layers": 2,
        "mlp_ratio": 2.0,
        "output_dim": 128,
        "patch_size": 14,
        "width": 64,
    },
}


def write_small_checkpoint(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random checkpoint of SMALL with `changes` to its config.json, float16 in one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**SMALL, **changes}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(
        json.dumps({"chat_format": "chatml", "max_new_tokens": 16, "do_sample": False, "max_window_size": 6144})
    )
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(RANKS))
    (folder / "qwen.tiktoken").write_text("".join(lines))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(Config.from_dict(settings)).items():
        scale = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
        values = torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)
        tensors[name] = (values + scale).half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose ranks are the 256 bytes: token id = byte value."""
    return Tokenizer({bytes([byte]): byte for byte in range(RANKS)})


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests leave in a cache stays out of that of whoever runs them; their processes inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def vit_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of exported vision towers, once for all tests. Its parent is an XDG_CACHE_HOME.

    Exports into it run in this process: one of its own spends seconds on importing torch and onnx. A test about
    exporting takes another folder.
    """
    from export.part import export_vit

    cache, in_its_own_process = tmp_path_factory.mktemp("xdg").resolve() / "qvl_edge", vit_cache_module._export

    def export(checkpoint: Checkpoint, folder: Path, dtype: str, progress: Any) -> None:
        if folder.parent.resolve() == cache:
            export_vit(checkpoint, folder, dtype=dtype)
        else:
            in_its_own_process(checkpoint, folder, dtype, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit_cache_module, "_export", export)
        yield cache


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: at the end of a run both of its processes then have something left to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def full_size() -> Tokenizer:
    """The tokenizer of the published model, as far as golden texts go.

    data/golden_ranks.tiktoken holds the 840 of qwen.tiktoken's 151,643 ranks that any part of a golden text can become,
    so merging goes as with the full file; the other ids are byte strings that no UTF-8 text contains.
    """
    lines = (line.split() for line in (DATA / "golden_ranks.tiktoken").read_bytes().splitlines())
    known = {int(rank): base64.b64decode(token) for token, rank in lines}
    filler = (b"\xff" + rank.to_bytes(3, "big") for rank in range(151_643))  # 0xff never occurs in UTF-8
    return Tokenizer({known.get(rank, unused): rank for rank, unused in enumerate(filler)})


@pytest.fixture
def small_checkpoint(tmp_path: Path) -> Path:
    """A random checkpoint of two blocks."""
    return write_small_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """write_small_checkpoint below the test's folder: make_checkpoint(name, seed=…, **config changes)."""
    return lambda name, **options: write_small_checkpoint(tmp_path / name, **options)
