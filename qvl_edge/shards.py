"""Files of weights: each opened as tensors by name, without running code, and memory-mapped where that can be."""

import json
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qvl_edge.errors import CheckpointError
from qvl_edge.files import POINTER, is_pointer

ZERO3 = (
    "Empty tensors are what DeepSpeed's ZeRO-3 saves of a model that is spread over GPUs: make the whole ones with its "
    "zero_to_fp32.py, or train again with stage3_gather_16bit_weights_on_model_save"
)
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # under which training tools save a model's tensors
_PREFIX = re.compile(r"base_model\.(?:model\.)?|model\.")  # of a merged PEFT model, and of Lightning
# of DataParallel, torch.compile, FSDP and DeepSpeed, which may stand before any part of a name
_WRAPPED = re.compile(r"\b(?:module|_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_MAX_HEADER = 16 << 20  # bytes: the published model's takes 0.1 MB, and one of 99 MB took the parser 40 s
_DTYPES = frozenset("F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL".split())  # of safetensors; a model has no other ones


class SafetensorsShard:
    """A .safetensors file: its tensors are views of the mapped file."""

    mapped = True

    def __init__(self, path: Path):
        self.path = path
        try:
            if (length := _header_bytes(path)) > _MAX_HEADER:
                raise CheckpointError(f"{path} has a header of {length} bytes, at most {_MAX_HEADER} are read")
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be opened: {error}{_size_note(path)}; copy the file again") from None
        for name in self.names():
            if (dtype := self._file.get_slice(name).get_dtype()) not in _DTYPES:
                raise CheckpointError(f"{path}: {name} is {dtype}, which no tensor of this model is")

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


def _header_bytes(path: Path) -> int:
    """What the first 8 bytes say; 0 if they are not there."""
    with open(path, "rb") as file:
        start = file.read(8)
    return (
        struct.unpack("<Q", start)[0] if len(start) == 8 and struct.unpack("<Q", start)[0] < path.stat().st_size else 0
    )


def _size_note(path: Path) -> str:
    """', 123 bytes where its header promises 456' for a truncated safetensors file, else ''."""
    try:
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(min(length, _MAX_HEADER)))
        promised = 8 + length + max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        return ""
    size = path.stat().st_size
    return f" ({size} bytes where its header promises {promised})" if size != promised else ""


class BinShard:
    """A file of torch.save, loaded as tensors only, of which those in a zip archive (torch >= 1.6) are mapped."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.mapped = zipfile.is_zipfile(path)
            if self.mapped:
                _check_archive(path)
            with warnings.catch_warnings(action="ignore"):  # about protocols of pickle, whose remedy is not the user's
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=self.mapped)
        except CheckpointError:
            raise
        except Exception as error:  # of a damaged file nearly any
            # not pickle's own text, which advises to load the file in a way that runs what it holds
            known = isinstance(error, OSError | RuntimeError) and str(error)
            reason = str(error).splitlines()[0] if known else "it is damaged, or holds something else, even code to run"
            raise CheckpointError(
                f"{path} cannot be loaded as tensors only: {reason}; copy the file again, or convert it to safetensors"
            ) from None
        for wrapper in _WRAPPERS if isinstance(tensors, dict) else ():
            tensors = tensors.get(wrapper, tensors)
        if not isinstance(tensors, dict):
            raise CheckpointError(f"{path} holds a {type(tensors).__name__}, expected a dictionary of tensors by name")
        if others := [key for key, value in tensors.items() if not isinstance(value, Tensor)]:
            kind = type(tensors[others[0]]).__name__
            raise CheckpointError(f"{path} holds {others[0]!r} of type {kind}, expected nothing but tensors by name")
        for name, tensor in tensors.items():
            if not isinstance(name, str):
                raise CheckpointError(f"{path} names a tensor {name!r}, expected text")
            if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
                kind = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
                raise CheckpointError(f"{path}: {name} is {kind}, expected plain tensors; save the model again")
            if tensor.is_complex():
                raise CheckpointError(f"{path}: {name} is {tensor.dtype}, which no tensor of this model is")
        self._tensors: dict[str, Tensor] = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def _check_archive(path: Path) -> None:
    """CheckpointError for what torch.save does not write, and what takes long to read."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:  # 0.3 MB may become 300
                raise CheckpointError(f"{path} is compressed, which torch.save never does; save the model again")
            if entry.filename.endswith("/data.pkl") and entry.file_size > _MAX_HEADER:
                raise CheckpointError(f"{path} has {entry.file_size} bytes of names, at most {_MAX_HEADER} are read")


Shard: TypeAlias = SafetensorsShard | BinShard


def open_shard(path: Path) -> Shard:
    """The file at `path`, by the ending of its name. CheckpointError if it cannot be read as tensors."""
    if not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{path} is {'no file' if path.exists() else 'missing'}; copy it from the model")
    if is_pointer(path):
        raise CheckpointError(POINTER.format(path=path, folder=path.parent))
    return SafetensorsShard(path) if path.suffix == ".safetensors" else BinShard(path)


def published_name(name: str) -> str:
    """A tensor's name without what training tools put before it."""
    name = _WRAPPED.sub("", name)
    return name[prefix.end() :] if (prefix := _PREFIX.match(name)) else name
