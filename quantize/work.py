"""Where a running quantization keeps what is finished, so that it can stop at any moment and go on.

BUNDLE/.gptq-work holds settings.json (written first, removed first), finished files of the bundle, whatever else the
run needs to go on, and ready.json once all files are finished. The bundle's own files appear at the end, by renaming.
Whatever point a run is stopped at, the next one reaches the same bytes; an older decoder in the bundle stays whole
until the new one is complete.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvl_edge.bundle import MANIFEST, WORK, add_part, check_same_source, sha256_of, write_json
from qvl_edge.config import read_json
from qvl_edge.errors import BundleError

SETTINGS, READY = "settings.json", "ready.json"
PART = "decoder"


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


def _finished(folder: Path) -> dict[str, Any] | None:
    """The decoder's entry in bundle.json, if there is one."""
    if not (folder / MANIFEST).exists():
        return None
    entry: dict[str, Any] | None = read_json(folder / MANIFEST).get("parts", {}).get(PART)
    return entry


def _intact(folder: Path, entry: Mapping[str, Any]) -> bool:
    return all(
        (folder / name).is_file()
        and (folder / name).stat().st_size == expected["bytes"]
        and sha256_of(folder / name) == expected["sha256"]
        for name, expected in entry["files"].items()
    )


class WorkFolder:
    """The work folder of one bundle; made by `open_work`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = folder
        self.settings = settings
        self.path = folder / WORK

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def nbytes(self) -> int:
        """Bytes that the folder holds."""
        return sum(file.stat().st_size for file in self.path.iterdir())

    @property
    def is_ready(self) -> bool:
        """Whether an earlier run finished every file and was stopped while publishing them."""
        return (self.path / READY).exists()

    def publish(self, files: list[str] | None = None) -> None:
        """Move the finished files into the bundle, enter them into bundle.json, and remove the work folder.

        `files` is None to go on with what an earlier run began to publish (`is_ready`).
        """
        if files is None:
            files = list(read_json(self.path / READY)["files"])
        else:
            write_json(self.path / READY, {"files": files})
        old = _finished(self.folder)
        if old is not None and any((self.path / name).exists() for name in files):
            for name in set(old["files"]) - set(files):
                (self.folder / name).unlink(missing_ok=True)
            content = read_json(self.folder / MANIFEST)
            del content["parts"][PART]
            write_json(self.folder / MANIFEST, content)
        for name in files:
            if (self.path / name).exists():
                (self.path / name).replace(self.folder / name)
        info = {key: value for key, value in self.settings.items() if key != "fingerprint"}
        add_part(self.folder, PART, files, fingerprint=self.settings["fingerprint"], info=info)
        self.clear()

    def clear(self) -> None:
        """Remove the folder."""
        # without its settings the folder is rubbish that the next run sweeps away
        (self.path / SETTINGS).unlink(missing_ok=True)
        shutil.rmtree(self.path)


def open_work(folder: Path, source: Path, settings: Mapping[str, Any], *, overwrite: bool) -> WorkFolder | None:
    """The work folder for these settings, new or to be resumed; None if the bundle is finished with these settings.

    settings: JSON values, with the source's "fingerprint". BundleError if the folder is the checkpoint itself or holds
    something else, if a run was begun or finished with other settings (unless `overwrite`), or if its ViT is another
    model's.
    """
    if folder.resolve() == source.resolve():
        raise BundleError(
            f"{folder} is the checkpoint itself, which stays untouched; give another folder for the bundle"
        )
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"{folder} is a file; give a folder for the bundle")
    work = WorkFolder(folder, settings)
    foreign = [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("config.json")]
    if foreign and not (folder / MANIFEST).exists() and not work.path.exists():
        raise BundleError(
            f"{folder} holds {foreign[0].name} and is not a bundle; give a new or an empty folder: nothing is lost"
        )
    check_same_source(folder, PART, fingerprint=settings["fingerprint"])
    if (work / SETTINGS).exists():
        found = difference(read_json(work / SETTINGS), settings)
        if found is None:
            return work
        if not overwrite:
            raise BundleError(
                f"{folder} holds an unfinished quantization with other settings: {found}. Repeat its settings to "
                "resume it, or add --overwrite to start again"
            )
        work.clear()
    elif work.path.exists():
        shutil.rmtree(work.path)
    entry = _finished(folder)
    if entry is not None and not overwrite:
        found = difference({key: entry.get(key) for key in settings}, settings)
        if found is None and _intact(folder, entry):
            return None
        raise BundleError(
            f"{folder} holds a finished decoder "
            + (f"with other settings: {found}" if found else "whose files are damaged or missing")
            + "; add --overwrite to replace it, or give another folder"
        )
    work.path.mkdir(parents=True)
    write_json(work / SETTINGS, settings)
    return work
