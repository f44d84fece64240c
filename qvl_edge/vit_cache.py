"""The vision tower of an untouched checkpoint, exported once into a cache folder by the export command."""

import importlib.util
import shlex
import subprocess
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TypeAlias

from qvl_edge import child
from qvl_edge.bundle import MANIFEST, VIT, read_manifest
from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.errors import BundleError
from qvl_edge.files import cache_home, locked, remembered, sha256_of
from qvl_edge.lora import LoraCheckpoint

Progress: TypeAlias = Callable[[str], None]


def exported_vit(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    cache_dir: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Path of the checkpoint's vit.onnx in `dtype`, made now unless the cache has it.

    The folder's name holds the fingerprint of the weights, so an edited checkpoint is exported anew, and so is a file
    that is not what its export wrote. BundleError if the export cannot run or fails, with its last line of output.
    """
    if isinstance(checkpoint, LoraCheckpoint) and not checkpoint.changes(VISUAL):
        checkpoint = Checkpoint(checkpoint.path)  # the tower of the base, which may be there already
    folder = Path(cache_dir or cache_home()) / f"vit-{checkpoint.fingerprint[:16]}-{dtype}"
    if not _is_exported(folder):
        with locked(folder.parent / "vit.lock"):
            if not _is_exported(folder):  # another process has made it meanwhile
                _remove_damaged(folder / MANIFEST)
                _export(checkpoint, folder, dtype, progress)
    return folder / VIT


def _is_exported(folder: Path) -> bool:
    try:
        files = read_manifest(folder).get("vit", {}).get("files", {})
    except BundleError:
        return False
    return bool(files) and all(
        (folder / name).is_file() and remembered([folder / name], partial(sha256_of, folder / name)) == entry["sha256"]
        for name, entry in files.items()
    )


def _remove_damaged(manifest: Path) -> None:
    """Remove a manifest that cannot be read: the export would end at it, now and for ever."""
    try:
        read_manifest(manifest.parent)
    except BundleError:
        manifest.unlink()


def _export(checkpoint: Checkpoint, folder: Path, dtype: str, progress: Progress | None) -> None:
    if importlib.util.find_spec("onnx") is None:
        raise BundleError(
            f"the vision tower of {checkpoint.path} has to be exported once, and that needs the package onnx: "
            "pip install 'qvl-edge[export]'"
        )
    arguments = [str(checkpoint.path), str(folder), "--dtype", dtype]
    if isinstance(checkpoint, LoraCheckpoint):
        arguments += ["--lora", str(checkpoint.adapter)]
    if progress:
        progress(f"exporting the vision tower into {folder} (once)")
    with child.start("export.vit", *arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        last = ""
        try:
            for line in process.stderr:
                last = line.strip() or last
                if progress:
                    progress(line.rstrip())
        except BaseException:  # stopped, or nobody reads the progress: leaving `with` would wait for the export's end
            process.terminate()
            raise
    if process.returncode != 0:
        command = shlex.join(["python", "-m", "export.vit", *arguments])
        raise BundleError(f"`{command}` failed with exit code {process.returncode}: {last}")
