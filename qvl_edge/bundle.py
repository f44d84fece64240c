"""The bundle on disk: what two commands make of a checkpoint, and the only place that names its files.

    bundle.json                manifest: format_version, fingerprint of the source, parts with the sha256 of every file
    config.json, generation_config.json, quantize_config.json, qwen.tiktoken, model*.safetensors   part "decoder"
    vit.onnx, vit.onnx.data                                                                        part "vit"

Both parts carry the fingerprint of their source, so halves of two models cannot be mixed.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config
from qvl_edge.errors import BundleError
from qvl_edge.files import POINTER, is_plain_name, is_pointer, read_json, sha256_of, write_json

FORMAT_VERSION = 1
MANIFEST = "bundle.json"
VIT, VIT_DATA = "vit.onnx", "vit.onnx.data"
VIT_DTYPES = ("float16", "float32", "int8", "int4")  # that a vision tower is exported in
WORK = ".gptq-work"  # what a stopped quantization resumes from
COMMANDS = {
    "decoder": "python -m quantize.gptq CHECKPOINT {path}",
    "vit": "python -m export.vit CHECKPOINT {path}",
}
_PART = {"fingerprint": str, "files": {"*": {"bytes": int, "sha256": str}}}
_KINDS = {str: "text", int: "an integer", dict: "an object"}
_ALWAYS_VERIFIED = 64 << 20  # bytes: smaller files are hashed at every opening, larger ones on request


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The parts that bundle.json lists, by name; none if it is not there.

    A part is {"fingerprint": text, "files": {name: {"bytes": count, "sha256": text}}, …}, and "vit" has its "dtype".
    BundleError for another format_version, and if anything of this is missing or of another type.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return {}
    content = read_json(path, error=BundleError)
    if content.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format_version {content.get('format_version')}, this version reads {FORMAT_VERSION}; make the "
            "bundle again or use a matching qvl_edge"
        )
    _check(path, "parts", content.get("parts"), {"*": _PART})
    parts: dict[str, dict[str, Any]] = content["parts"]
    if unknown := sorted(parts.keys() - COMMANDS.keys()):
        raise BundleError(f"{path}: parts has {unknown[0]!r}, known are {', '.join(COMMANDS)}")
    for part, entry in parts.items():
        for name in entry["files"]:
            if not is_plain_name(name):  # writers delete and readers open what is listed
                raise BundleError(
                    f"{path}: parts.{part}.files has {name!r:.60}, which is no file of its folder; do not use this "
                    "bundle, make it again in an empty folder"
                )
    if "vit" in parts:
        _check(path, "parts.vit.dtype", dtype := parts["vit"].get("dtype"), str)
        if dtype not in VIT_DTYPES:
            raise BundleError(f"{path}: parts.vit.dtype is {dtype!r:.40}, known are {', '.join(VIT_DTYPES)}")
    return parts


def _check(path: Path, where: str, value: Any, schema: Any) -> None:
    """BundleError unless `value` is of the type `schema`, or an object with its fields; "*" stands for every field."""
    kind = dict if isinstance(schema, dict) else schema
    if type(value) is not kind:
        raise BundleError(
            f"{path}: {where} is {'missing' if value is None else repr(value)[:40]}, expected {_KINDS[kind]}; copy the "
            "file again, or make the bundle again in an empty folder"
        )
    for field, inner in schema.items() if kind is dict else ():
        for name in value if field == "*" else [field]:
            _check(path, f"{where}.{name}", value.get(name), inner)


def _write_manifest(folder: Path, parts: Mapping[str, Any]) -> None:
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "parts": dict(sorted(parts.items()))})


def add_part(
    folder: Path, part: str, files: list[str], *, fingerprint: str, info: Mapping[str, Any] | None = None
) -> None:
    """Enter a finished part ("decoder" or "vit") and its files into bundle.json: the last step of a writer.

    info: what else is to be known of it; of a vit its "dtype". BundleError if the other part comes from another source.
    """
    check_same_source(folder, part, fingerprint)
    entry = {
        "fingerprint": fingerprint,
        **(info or {}),
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
            for name in sorted(files)
        },
    }
    _write_manifest(folder, read_manifest(folder) | {part: entry})


def remove_part(folder: Path, part: str) -> None:
    """Take a part out of bundle.json, before a writer replaces its files."""
    _write_manifest(folder, {name: entry for name, entry in read_manifest(folder).items() if name != part})


def check_same_source(folder: Path, part: str, fingerprint: str) -> None:
    """BundleError if `folder` holds another part made from another model; writers call it before they start."""
    for other, entry in read_manifest(folder).items():
        if other != part and entry["fingerprint"] != fingerprint:
            raise BundleError(
                f"{folder} holds the {other} of another model (fingerprint {entry['fingerprint'][:12]}, this one is "
                f"{fingerprint[:12]}); use an empty folder, or make the {other} again from the same checkpoint"
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
        parts = read_manifest(path)
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
        return self.parts["decoder"]["fingerprint"]

    @property
    def checkpoint(self) -> Checkpoint:
        """The decoder's tensors, under the names of the published Int4 checkpoint."""
        return Checkpoint(self.path, only=self.parts["decoder"]["files"])

    @property
    def vit(self) -> Path:
        """The exported vision tower."""
        return self.path / VIT

    @property
    def vit_dtype(self) -> str:
        """How the vision tower was exported: "float32", "float16", "int8" or "int4"."""
        return self.parts["vit"]["dtype"]


def _check_file(folder: Path, part: str, name: str, expected: Mapping[str, Any], *, verify: bool) -> None:
    file, again = folder / name, f"make the {part} again with:\n  {COMMANDS[part].format(path=folder)}"
    if not file.is_file():
        raise BundleError(f"{file} is missing; copy it, or {again}")
    if is_pointer(file):
        raise BundleError(POINTER.format(path=file, folder=folder))
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise BundleError(f"{file} has {size} bytes, {MANIFEST} says {expected['bytes']}; copy it again, or {again}")
    if (verify or size <= _ALWAYS_VERIFIED) and (found := sha256_of(file)) != expected["sha256"]:
        raise BundleError(
            f"{file} has sha256 {found[:16]}…, {MANIFEST} says {expected['sha256'][:16]}…: it is damaged or was "
            f"changed; copy it again, or {again}"
        )
