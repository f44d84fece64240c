"""A published checkpoint on disk: its settings, and its tensors by name, memory-mapped, one at a time."""

import hashlib
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qvl_edge.config import Config
from qvl_edge.errors import CheckpointError, ConfigError
from qvl_edge.files import POINTER, is_pointer, read_json, remembered
from qvl_edge.memory import forget_pages
from qvl_edge.shards import Shard, open_shard, published_name

VISUAL = "transformer.visual."  # prefix of the vision tower's tensors
GENERATION = "generation_config.json"
SAFETENSORS_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
# names of files of weights by ending, in the order of preference: transformers', and auto-gptq's gptq_model-4bit-128g
WEIGHTS = {
    ".safetensors": ("*.safetensors",),
    ".bin": ("pytorch_model*.bin", "model*.bin", "gptq_model*.bin"),
    ".pt": ("model*.pt", "gptq_model*.pt"),
}
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.\w+")
_OUTER = {"transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"}


class Checkpoint:
    """A folder in the published layout: config.json, qwen.tiktoken, shards (.safetensors, or .bin with weights_only).

    Opening reads headers only; CheckpointError names a missing, truncated or foreign file, ConfigError a bad setting.
    """

    def __init__(self, path: str | Path, *, only: Collection[str] | None = None):
        """only: names of files; others are not looked at."""
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(
                f"{self.path} is not a folder; give the folder that holds config.json and the weights"
            )
        names = {file.name for file in self.path.iterdir()}
        refuse_adapter(self.path)
        self.config = Config.from_folder(self.path)
        self.generation = _read_generation(self.path)
        self._tensors = _find_weights(self.path, self.config, names if only is None else names.intersection(only))

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        """The tensor `name` on the CPU, in the file's dtype, memory-mapped. CheckpointError if there is none."""
        shard, key = self._place(name)
        return shard.tensor(key)

    def release(self, name: str) -> None:
        """Release the pages that reading `name` brought into memory; its tensor stays valid and is read again.

        A loader calls it after each tensor, or a checkpoint of 10 GB would leave 10 GB mapped beside what was made from
        it. Mapped files on Linux only; elsewhere nothing happens.
        """
        shard, key = self._place(name)
        if shard.mapped:
            forget_pages(shard.tensor(key))

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor `name` on disk."""
        shard, key = self._place(name)
        return shard.tensor(key).nbytes

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`, without reading it."""
        shard, key = self._place(name)
        return shard.shape(key)

    def _place(self, name: str) -> tuple[Shard, str]:
        """The file that holds the tensor `name`, and its name there."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name} among its {len(self._tensors)}")
        return self._tensors[name]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over each tensor's name, shape, dtype and bytes; kept beside the caches while the files stay the same.

        (9.7 GB take some 10 s.)
        """
        return remembered({shard.path for shard, _ in self._tensors.values()}, self._hash)

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for name in self.names:
            tensor = self[name]
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            self.release(name)
        return digest.hexdigest()


def _read_generation(folder: Path) -> dict[str, Any]:
    """generation_config.json, where there is one. ConfigError for a chat_format or a window that makes no sense."""
    file = folder / GENERATION
    generation = read_json(file) if os.path.lexists(file) else {}  # a link to nothing is an error
    if (found := generation.get("chat_format")) not in (None, "chatml", "raw"):
        raise ConfigError(
            f"{file}: chat_format is {found!r}, known are 'chatml' and 'raw'; copy the file from the model that "
            "this one was trained from"
        )
    if (window := generation.get("max_window_size")) is not None and (type(window) is not int or window < 1):
        raise ConfigError(f"{file}: max_window_size is {window!r:.80}, expected a number of tokens from 1 on")
    return generation


def raw_reason(folder: Path) -> str:
    """Why the model in `folder` continues text, and what to do if it was trained to chat; empty if it chats."""
    generation = _read_generation(folder)
    if generation.get("chat_format") == "chatml":
        return ""
    found = "sets chat_format raw" if generation.get("chat_format") else "sets no chat_format"
    file = folder / GENERATION
    return (
        f"{file} {found if file.exists() else 'is missing'}, so text is continued, as by the base model. If this one "
        f"was trained to chat, copy {GENERATION} of Qwen-VL-Chat there, or give --chat-format chatml"
    )


def refuse_adapter(folder: Path) -> None:
    """CheckpointError if `folder` holds an adapter and no model."""
    names = {file.name for file in folder.iterdir()}
    if ADAPTER_CONFIG in names and not any(map(is_weights, names)):
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "CHECKPOINT"
        raise CheckpointError(
            f"{folder} is an adapter, not a model; give the model that it was trained on, and the adapter as --lora:\n"
            f"  {base} --lora {folder}"
        )


def is_weights(name: str) -> bool:
    """Whether a file of this name holds a model's weights, and not an adapter's."""
    known = (fnmatchcase(name, pattern) for patterns in WEIGHTS.values() for pattern in patterns)
    return name not in ADAPTER_FILES and any(known)


_Tensors: TypeAlias = dict[str, tuple[Shard, str]]
"""By the published name of a tensor: the file that holds it, and its name there."""


def _find_weights(folder: Path, config: Config, names: Collection[str]) -> _Tensors:
    """The tensors of the first set of files that is all there and makes a whole model.

    A warning names the files that are left over. If no set makes a whole model, it is the first that is all there, and
    what reads it says what it lacks. CheckpointError if there is none.
    """
    found, whole, problems = None, False, []
    for source, files in _sets(folder, names):
        if problem := _problem(folder, source, files):
            problems.append(problem)
            continue
        tensors = _open(folder, files)
        whole = _is_whole(tensors, config)
        if found is None or whole:
            found = (source, files, tensors)
        if whole:
            break
    if problems and not whole:
        raise CheckpointError(problems[0])
    if found is None:
        expected = ", ".join(pattern for patterns in WEIGHTS.values() for pattern in patterns)
        raise CheckpointError(f"{folder} holds no weights; expected {expected} beside config.json")
    source, files, tensors = found
    left = sorted(
        name
        for name in {*names} - {source, *files}
        if is_weights(name) or name.endswith(_INDEX) or name in ADAPTER_FILES
    )
    if left:
        adapter = "; --lora merges an adapter" if {*left} & {*ADAPTER_FILES} else ""
        warnings.warn(
            f"{folder}: the model is read from {source}; ignored are {', '.join(left)}{adapter}", stacklevel=3
        )
    return tensors


def _sets(folder: Path, names: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """(what names them, files) of each set that may be the model, in the order of preference."""
    for ending in WEIGHTS:
        held = sorted(name for name in names if name.endswith(ending) and is_weights(name))
        for name in held:
            if name in _WHOLE:
                yield name, [name]
        for index in sorted(name for name in names if name.endswith(f"{ending}{_INDEX}")):
            yield index, _listed(folder / index)
        numbered: dict[tuple[str, ...], list[str]] = {}
        others = []
        for name in held:
            if part := _NUMBERED.fullmatch(name):
                stem, _, count = part.groups()
                numbered.setdefault((stem, count), []).append(name)
            elif name not in _WHOLE:
                others.append(name)
        for (stem, count), parts in numbered.items():
            yield parts[0], [f"{stem}-{number:05d}-of-{count}{ending}" for number in range(1, int(count) + 1)]
        if others:
            yield ", ".join(others), others


def _listed(index: Path) -> list[str]:
    """The files that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to files")
    return sorted(set(weight_map.values()))


def _problem(folder: Path, source: str, files: list[str]) -> str:
    """Why a set cannot be read: files that are not there, or that git keeps elsewhere. Empty if it can."""
    missing = [name for name in files if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        by = f" that {source} lists" if source.endswith(_INDEX) else ""
        return (
            f"{folder} lacks {len(missing)} of the {len(files)} shards{by}: {', '.join(missing[:5])}; copy them from "
            "the source of the checkpoint"
        )
    pointers = [name for name in files if is_pointer(folder / name)]
    return POINTER.format(path=folder / pointers[0], folder=folder) if pointers else ""


def _open(folder: Path, files: Iterable[str]) -> _Tensors:
    tensors: _Tensors = {}
    for shard in (open_shard(folder / name) for name in files):
        for key in shard.names():
            name = published_name(key)
            if name in tensors:
                raise CheckpointError(f"{name} is in {tensors[name][0].path.name} and in {shard.path.name}")
            tensors[name] = (shard, key)
    return tensors


def _is_whole(tensors: _Tensors, config: Config) -> bool:
    """Whether there are outer tensors, every block and a vision tower: not a part that some tool left behind."""
    blocks = {name.split(".")[2] for name in tensors if name.startswith("transformer.h.")}
    visual = any(name.startswith(VISUAL) for name in tensors)
    return _OUTER <= {*tensors} and len(blocks) >= config.num_hidden_layers and visual
