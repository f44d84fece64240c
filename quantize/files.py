"""The decoder's files: in a work folder while a quantization runs, then in the bundle.

BUNDLE/.gptq-work holds settings.json (written first, removed first), finished files of the bundle, whatever else the
run needs to resume, and ready.json once all files are finished. The bundle's own files appear at the end, by renaming.
Wherever a run is stopped, the next one ends in the same bytes; an older decoder in the bundle stays whole until the new
one is complete. A lock in the folder keeps a second run out; the system releases it when its holder ends.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qvl_edge.bundle import MANIFEST, WORK, add_part, check_same_source, read_manifest, remove_part
from qvl_edge.checkpoint import SAFETENSORS_INDEX, Checkpoint
from qvl_edge.config import Config, QuantConfig
from qvl_edge.errors import BundleError, CheckpointError, ConfigError
from qvl_edge.files import copy_file, is_plain_name, locked, read_json, sha256_of, write_json, write_shard
from qvl_edge.model.loading import QUANTIZED, expected_tensors, gptq_shapes
from qvl_edge.model.streaming import check_finite
from qvl_edge.text.tokenizer import VOCAB_FILE

SETTINGS, READY, LOCK = "settings.json", "ready.json", "lock"
REPORT = "quantize_report.json"
OUTER = ("transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight")  # everything outside the blocks
_PART = "decoder"
_COPIED = ("generation_config.json", "tokenizer_config.json")  # where the source has them
_PIECE = 4096  # rows per piece of the last shard: 34 MB of the published tables


class WorkFolder:
    """The work folder of one bundle; made by `open_work`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = folder
        self.settings = settings
        self.path = folder / WORK

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def is_ready(self) -> bool:
        """Whether an earlier run finished every file and was stopped while publishing them."""
        return (self / READY).exists()

    def begin(self) -> None:
        """Write the settings, unless they are there: from here on the folder is a run that can be resumed."""
        if not (self / SETTINGS).exists():
            write_json(self / SETTINGS, self.settings)

    def publish(self, files: list[str] | None = None) -> None:
        """Move the finished files into the bundle, enter them into bundle.json, and empty the work folder.

        files=None resumes what an earlier run began to publish (`is_ready`).
        """
        if files is None:
            files = self._ready()
        else:
            write_json(self / READY, {"files": files})
        old = read_manifest(self.folder).get(_PART)
        if old is not None and any((self / name).exists() for name in files):
            for name in set(old["files"]) - set(files):
                (self.folder / name).unlink(missing_ok=True)
            remove_part(self.folder, _PART)
        for name in files:
            if (self / name).exists():
                (self / name).replace(self.folder / name)
        info = {key: value for key, value in self.settings.items() if key != "fingerprint"}
        add_part(self.folder, _PART, files, fingerprint=self.settings["fingerprint"], info=info)
        self.empty()

    def _ready(self) -> list[str]:
        files = read_json(self / READY).get("files")
        if not isinstance(files, list) or not all(is_plain_name(name) for name in files):
            raise BundleError(f"{self / READY} does not list files of its folder; delete {self.path} and start again")
        return files

    def empty(self) -> None:
        """Remove everything but the lock."""
        (self / SETTINGS).unlink(missing_ok=True)  # without it the rest is stale, and deleted by the next run
        for file in self.path.iterdir():
            if file.name != LOCK:
                file.unlink()


@contextmanager
def open_work(
    folder: Path, source: Path, settings: Mapping[str, Any], *, overwrite: bool
) -> Iterator[WorkFolder | None]:
    """The work folder for these settings, new or to be resumed (see `begin`); None if the bundle is finished with them.

    settings: JSON values, with the source's "fingerprint". BundleError if the folder is the checkpoint itself or holds
    something else, if a run was begun or finished with other settings (unless `overwrite`), if its ViT is another
    model's, or if another process is running there: the context holds the lock.
    """
    if folder.resolve() == source.resolve():
        raise BundleError(
            f"{folder} is the checkpoint itself, which stays untouched; give another folder for the bundle"
        )
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"{folder} is a file; give a folder for the bundle")
    work = WorkFolder(folder, settings)
    for file in (work.path, *(work.path.iterdir() if work.path.is_dir() else ())):
        if file.is_symlink():
            raise BundleError(
                f"{file} is a link to {os.readlink(file)}, which this would write to; delete the link and start again"
            )
    foreign = [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("config.json")]
    if foreign and not (folder / MANIFEST).exists() and not work.path.exists():
        raise BundleError(
            f"{folder} holds {foreign[0].name} and is not a bundle; give a new or an empty folder: nothing is lost"
        )
    check_same_source(folder, _PART, fingerprint=settings["fingerprint"])
    # checked without the lock where there is nothing to clean up: a finished bundle is only read
    if not overwrite and not work.path.exists() and _already_done(folder, settings):
        yield None
        return
    with _exclusive(work.path):
        if (work / SETTINGS).exists():
            found = difference(read_json(work / SETTINGS), settings)
            if found is not None:
                if not overwrite:
                    raise BundleError(
                        f"{folder} holds an unfinished quantization with other settings: {found}. Repeat its settings "
                        "to resume it, or add --overwrite to start again"
                    )
                work.empty()
        else:
            work.empty()
            if not overwrite and _already_done(folder, settings):
                yield None
                return
        yield work


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold the lock of the work folder `path`, which is made, and removed again if nothing else was put into it.

    BundleError if another process holds it.
    """
    made = [parent for parent in (path, *path.parents) if not parent.exists()] or [path]
    busy = f"another quantization is running in {path.parent}; wait for it to end, or give another folder"
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(path / LOCK, busy=busy))
                break
            except FileNotFoundError:  # its holder has just removed the folder
                continue
        try:
            yield
        finally:
            if os.listdir(path) == [LOCK]:
                (path / LOCK).unlink()
                for folder in made:
                    try:
                        folder.rmdir()
                    except OSError:  # not empty: it holds the bundle, or the next run has begun
                        break


def difference(old: Any, new: Any, name: str = "") -> str | None:
    """The first setting in which two differ, as "quantization.bits is 4 there and 8 here"; None if they agree."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            found = difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if old == new else f"{name} is {_short(old)} there and {_short(new)} here"


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 24 else f"{value!r}"


def _already_done(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the bundle is finished with these settings. BundleError if it is with others, or is damaged."""
    entry = read_manifest(folder).get(_PART)
    if entry is None:
        return False
    found = difference({key: entry.get(key) for key in settings}, settings)
    if found is None and _intact(folder, entry):
        return True
    raise BundleError(
        f"{folder} holds a finished decoder "
        + (f"with other settings: {found}" if found else "whose files are damaged or missing")
        + "; add --overwrite to replace it, or give another folder"
    )


def _intact(folder: Path, entry: Mapping[str, Any]) -> bool:
    return all(
        (folder / name).is_file()
        and (folder / name).stat().st_size == expected["bytes"]
        and sha256_of(folder / name) == expected["sha256"]
        for name, expected in entry["files"].items()
    )


def held_bytes(folder: Path) -> int:
    """Bytes that an earlier run has left in the work folder of the bundle `folder`."""
    work = folder / WORK
    return sum(file.stat().st_size for file in work.iterdir()) if work.exists() else 0


def shard_name(index: int, blocks: int) -> str:
    """File of block `index` (from 0); index == blocks is the last shard, with embeddings, final norm and head."""
    return f"model-{index + 1:05d}-of-{blocks + 1:05d}.safetensors"


def int4_config(config: Config, quant: QuantConfig) -> Config:
    """The config of the quantized decoder. ConfigError if a projection does not fit the packing or the groups."""
    per_word = 32 // quant.bits
    result = replace(config, quantization=quant)
    for layer in QUANTIZED:
        shapes = gptq_shapes(result, layer)  # ConfigError if the groups do not divide the inputs
        for what, size in (("inputs", shapes["g_idx"][0]), ("outputs", shapes["bias"][0])):
            if size % per_word:
                raise ConfigError(f"{layer} has {size} {what}, {quant.bits}-bit packing needs a multiple of {per_word}")
    return result


def decoder_bytes(checkpoint: Checkpoint, quantized: Config) -> int:
    """Bytes of the decoder's tensors, without the files' headers."""
    total = 0
    for name, shape in expected_tensors(quantized, visual=False).items():
        size = 4 if name.endswith(("qweight", "qzeros", "g_idx")) else 2
        if name in checkpoint:
            size = checkpoint[name].element_size()
        total += size * int(torch.Size(shape).numel())
    return total


def check_source(checkpoint: Checkpoint) -> None:
    """CheckpointError if a file that the bundle takes over is missing."""
    if not (checkpoint.path / VOCAB_FILE).is_file():
        raise CheckpointError(f"{checkpoint.path} lacks {VOCAB_FILE}; copy it from the source of the checkpoint")


def write_outer(work: WorkFolder, checkpoint: Checkpoint) -> None:
    """The last shard, in the source's dtype. CheckpointError if a value is not finite."""

    def pieces(name: str) -> Iterator[Tensor]:
        for rows in checkpoint[name].split(_PIECE):
            check_finite(name, rows)
            yield rows
            checkpoint.release(name)

    blocks = checkpoint.config.num_hidden_layers
    layout = {name: (checkpoint[name].dtype, checkpoint.shape(name)) for name in OUTER}
    write_shard(work / shard_name(blocks, blocks), layout, pieces)


def write_settings(
    work: WorkFolder, checkpoint: Checkpoint, quant: QuantConfig, report: Mapping[str, Any] | None
) -> list[str]:
    """Index, configs, tokenizer and report into the work folder; returns all files of the finished decoder."""
    blocks, source = checkpoint.config.num_hidden_layers, checkpoint.path
    shards = [shard_name(index, blocks) for index in range(blocks + 1)]
    weight_map, total = {}, 0
    for shard in shards:
        with safe_open(work / shard, framework="pt") as file:
            for name in file.keys():
                weight_map[name] = shard
                total += file.get_tensor(name).nbytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    config = read_json(source / "config.json") | {"quantization_config": quant.to_dict()}
    own = {"config.json": config, "quantize_config.json": quant.to_dict(), SAFETENSORS_INDEX: index}
    if report is not None:
        own[REPORT] = dict(report)
    for name, content in own.items():
        write_json(work / name, content)
    copied = [VOCAB_FILE, *(name for name in _COPIED if (source / name).exists())]
    for name in copied:
        copy_file(source / name, work / name)
    return [*shards, *own, *copied]
