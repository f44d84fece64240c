"""The bundle on disk: what two commands make of a checkpoint, and the only place that names its files.

    bundle.json                manifest: format_version, fingerprint of the source, parts with the sha256 of every file
    config.json, generation_config.json, quantize_config.json, qwen.tiktoken, model*.safetensors   part "decoder"
    vit.onnx, vit.onnx.data                                                                        part "vit"

Both parts carry the fingerprint of their source, so halves of two models cannot be mixed.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config, read_json
from qvl_edge.errors import BundleError

FORMAT_VERSION = 1
MANIFEST = "bundle.json"
VIT, VIT_DATA = "vit.onnx", "vit.onnx.data"
WORK = ".gptq-work"  # what a stopped quantization resumes from
COMMANDS = {
    "decoder": "python -m quantize.gptq CHECKPOINT {path}",
    "vit": "python -m export.vit CHECKPOINT {path}",
}
_ALWAYS_VERIFIED = 64 << 20  # bytes: smaller files are hashed at every opening, larger ones on request


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the yielded path beside `path`; on success it takes `path`'s place, on any error nothing stays.

    A full disk becomes a BundleError with the free bytes.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if not full:
            raise
        free = shutil.disk_usage(path.parent).free
        raise BundleError(
            f"the disk of {path.parent} is full ({free} bytes free) while writing {path.name}; "
            "nothing was replaced. Free some space and run the same command again."
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def check_free_space(folder: Path, needed: int) -> None:
    """BundleError if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BundleError(
            f"{folder} needs {needed / 1e6:.1f} MB and its disk has {free / 1e6:.1f} MB free; free some space or "
            "choose another folder"
        )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`value` as indented JSON, written beside and renamed."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, written beside and renamed, after checking that it fits on the disk."""
    check_free_space(path.parent, sum(tensor.nbytes for tensor in tensors.values()))
    with replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
        partial.chmod(mode)  # safetensors writes files that only their owner can read


def copy_file(source: Path, target: Path) -> None:
    """A copy, written beside and renamed."""
    with replacing(target) as partial:
        shutil.copyfile(source, partial)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add_part(
    folder: Path, part: str, files: list[str], *, fingerprint: str, info: Mapping[str, Any] | None = None
) -> None:
    """Enter a finished part ("decoder" or "vit") and its files into bundle.json: the last step of a writer.

    BundleError if the other part comes from another source.
    """
    manifest = folder / MANIFEST
    content: dict[str, Any] = {"format_version": FORMAT_VERSION, "parts": {}}
    if manifest.exists():
        content = read_json(manifest)
    check_same_source(folder, part, fingerprint)
    entry = {
        "fingerprint": fingerprint,
        **(info or {}),
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
            for name in sorted(files)
        },
    }
    content["parts"][part] = entry
    content["parts"] = dict(sorted(content["parts"].items()))
    write_json(manifest, content)


def check_same_source(folder: Path, part: str, fingerprint: str) -> None:
    """BundleError if `folder` holds another part made from another model; writers call it before they start."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return
    for other, entry in read_json(manifest).get("parts", {}).items():
        if other != part and entry.get("fingerprint") != fingerprint:
            raise BundleError(
                f"{folder} holds the {other} of another model (fingerprint {entry.get('fingerprint', '')[:12]}, this "
                f"one is {fingerprint[:12]}); use an empty folder, or make the {other} again from the same checkpoint"
            )


def is_bundle(path: str | Path) -> bool:
    """Whether `path` is a bundle or the beginning of one, rather than a checkpoint."""
    return (Path(path) / MANIFEST).exists() or (Path(path) / WORK).exists()


class Bundle:
    """An opened bundle.

    `open` checks the manifest, that both parts come from one source, and every file's size and hash (files over 64 MB
    are hashed with verify=True only). BundleError says what is wrong and which command makes it.
    """

    def __init__(self, path: Path, parts: dict[str, Any]):
        self.path = path
        self.parts = parts
        self.config = Config.from_folder(path)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> "Bundle":
        """Open and check; see the class."""
        path = Path(path)
        if not (path / MANIFEST).exists() and (path / WORK).exists():
            raise BundleError(
                f"{path} is an unfinished quantization; run the same command again and it resumes:\n"
                f"  {COMMANDS['decoder'].format(path=path)}"
            )
        if not (path / MANIFEST).exists():
            raise BundleError(
                f"{path} has no {MANIFEST}; make a bundle with:\n  {COMMANDS['decoder'].format(path=path)}"
            )
        content = read_json(path / MANIFEST)
        if content.get("format_version") != FORMAT_VERSION:
            raise BundleError(
                f"{path / MANIFEST} has format_version {content.get('format_version')}, this version reads "
                f"{FORMAT_VERSION}; make the bundle again or use a matching qvl_edge"
            )
        parts = content.get("parts", {})
        for part, command in COMMANDS.items():
            if part not in parts:
                raise BundleError(f"{path} has no {part} yet. Make it with:\n  {command.format(path=path)}")
        found = {part: entry["fingerprint"] for part, entry in parts.items()}
        if len(set(found.values())) != 1:
            raise BundleError(
                f"{path} mixes two models: "
                + ", ".join(f"{part} is from {fingerprint[:12]}" for part, fingerprint in found.items())
                + "; make one of them again from the other's checkpoint"
            )
        for part, entry in parts.items():
            for name, expected in entry["files"].items():
                _check_file(path, part, name, expected, verify=verify)
        return cls(path, parts)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the checkpoint that this bundle was made from."""
        return str(self.parts["decoder"]["fingerprint"])

    @property
    def checkpoint(self) -> Checkpoint:
        """The decoder's tensors, under the names of the published Int4 checkpoint."""
        return Checkpoint(self.path)

    @property
    def vit(self) -> Path:
        """The exported vision tower."""
        return self.path / VIT

    @property
    def vit_dtype(self) -> str:
        """How the vision tower was exported: "float32", "float16", "int8" or "int4"."""
        return str(self.parts["vit"]["dtype"])


def _check_file(folder: Path, part: str, name: str, expected: Mapping[str, Any], *, verify: bool) -> None:
    file, again = folder / name, f"make the {part} again with:\n  {COMMANDS[part].format(path=folder)}"
    if Path(name).name != name:
        raise BundleError(f"{folder / MANIFEST} names {name!r}, which is not a file of the bundle; {again}")
    if not file.is_file():
        raise BundleError(f"{file} is missing; copy it, or {again}")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise BundleError(f"{file} has {size} bytes, {MANIFEST} says {expected['bytes']}; copy it again, or {again}")
    if (verify or size <= _ALWAYS_VERIFIED) and (found := sha256_of(file)) != expected["sha256"]:
        raise BundleError(
            f"{file} has sha256 {found[:16]}…, {MANIFEST} says {expected['sha256'][:16]}…: it is damaged or was "
            f"changed; copy it again, or {again}"
        )
