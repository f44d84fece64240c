"""A published checkpoint on disk: its settings, and its tensors by name, memory-mapped, one at a time."""

import hashlib
import json
import pickle
import struct
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qvl_edge.config import Config
from qvl_edge.errors import CheckpointError
from qvl_edge.files import read_json
from qvl_edge.memory import forget_pages

VISUAL = "transformer.visual."  # prefix of the vision tower's tensors
SAFETENSORS_INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
_SAMPLE_BYTES = 4096  # read from both ends of every tensor for the fingerprint


class Checkpoint:
    """A folder in the published layout: config.json, qwen.tiktoken, shards (.safetensors, or .bin with weights_only).

    Opening reads headers only; CheckpointError names a missing, truncated or foreign file, ConfigError a bad setting.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(
                f"{self.path} is not a folder; give the folder that holds config.json and the weights"
            )
        self.config = Config.from_folder(self.path)
        generation = self.path / "generation_config.json"
        self.generation: dict[str, Any] = read_json(generation) if generation.exists() else {}
        index = next((self.path / n for n in (SAFETENSORS_INDEX, BIN_INDEX) if (self.path / n).exists()), None)
        weight_map = {} if index is None else _weight_map(index)
        self._shard_of: dict[str, Shard] = {}
        files = sorted({self.path / name for name in weight_map.values()}) or self._find_shards()
        for shard in map(open_shard, files):
            for name in shard.names():
                if name in self._shard_of:
                    raise CheckpointError(f"{name} is in {self._shard_of[name].path.name} and in {shard.path.name}")
                self._shard_of[name] = shard
        if lost := sorted(set(weight_map) - set(self._shard_of)):
            raise CheckpointError(
                f"the index of {self.path} lists {lost[0]} and {len(lost) - 1} more that no shard holds; the shards "
                "are not those of the index, copy them again"
            )

    def _find_shards(self) -> list[Path]:
        for pattern in ("*.safetensors", "pytorch_model*.bin"):
            if files := sorted(self.path.glob(pattern)):
                return files
        raise CheckpointError(
            f"{self.path} holds no weights; expected *.safetensors or pytorch_model*.bin beside config.json"
        )

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._shard_of)

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def __getitem__(self, name: str) -> Tensor:
        """The tensor `name` on the CPU, in the file's dtype, memory-mapped. CheckpointError if there is none."""
        return self._shard(name).tensor(name)

    def release(self, name: str) -> None:
        """Release the pages that reading `name` brought into memory; its tensor stays valid and is read again.

        A loader calls it after each tensor, or a checkpoint of 10 GB would leave 10 GB mapped beside what was made from
        it. Mapped files on Linux only; elsewhere nothing happens.
        """
        shard = self._shard(name)
        if shard.mapped:
            forget_pages(shard.tensor(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`, without reading it."""
        return self._shard(name).shape(name)

    def _shard(self, name: str) -> "Shard":
        if name not in self._shard_of:
            raise CheckpointError(f"{self.path} has no tensor {name} among its {len(self._shard_of)}")
        return self._shard_of[name]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over each tensor's name, shape, dtype and both ends: tells models apart without reading them whole."""
        digest = hashlib.sha256()
        for name in self.names:
            tensor = self[name]
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            flat = tensor.reshape(-1)
            ends = _SAMPLE_BYTES // tensor.element_size()
            for part in (flat[:ends], flat[-ends:]):
                digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class SafetensorsShard:
    """A .safetensors file: its tensors are views of the mapped file."""

    mapped = True

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be opened: {error}{_size_note(path)}; copy the file again") from None

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


def _size_note(path: Path) -> str:
    """', 123 bytes where its header promises 456' for a truncated safetensors file, else ''."""
    try:
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(min(length, 1 << 28)))
        promised = 8 + length + max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return ""
    size = path.stat().st_size
    return f" ({size} bytes where its header promises {promised})" if size != promised else ""


class BinShard:
    """A .bin file of torch.save, loaded as tensors only, of which those in a zip archive (torch >= 1.6) are mapped."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.mapped = zipfile.is_zipfile(path)
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=self.mapped)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{path} cannot be loaded as tensors only: {reason}; copy the file again, or convert it to safetensors"
            ) from None
        if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise CheckpointError(f"{path} holds a {type(tensors).__name__}, expected a dictionary of tensors by name")
        self._tensors: dict[str, Tensor] = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


Shard: TypeAlias = SafetensorsShard | BinShard


def open_shard(path: Path) -> Shard:
    """The file at `path`, by the ending of its name. CheckpointError if it cannot be read as tensors."""
    return BinShard(path) if path.suffix == ".bin" else SafetensorsShard(path)


def _weight_map(index: Path) -> dict[str, str]:
    """File names by tensor name; CheckpointError if a file is not there."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to files")
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if Path(name).name != name or not index.with_name(name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of the {len(files)} shards that {index.name} lists: "
            f"{', '.join(missing[:5])}; copy them from the source of the checkpoint"
        )
    return weight_map
