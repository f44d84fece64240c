"""Where a running quantization keeps what is finished, so that it can stop at any moment and go on.

BUNDLE/.gptq-work holds settings.json (written first, removed first), finished files of the bundle, whatever else the
run needs to go on, and ready.json once all files are finished. The bundle's own files appear at the end, by renaming.
Whatever point a run is stopped at, the next one reaches the same bytes; an older decoder in the bundle stays whole
until the new one is complete. A lock on the folder keeps a second run out; the system lifts it when its holder ends.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qvl_edge.bundle import MANIFEST, WORK, add_part, check_same_source, read_manifest, remove_part
from qvl_edge.errors import BundleError
from qvl_edge.files import read_json, sha256_of, write_json

SETTINGS, READY, LOCK = "settings.json", "ready.json", "lock"
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
    return read_manifest(folder).get(PART)


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
        return (self.path / READY).exists()

    def begin(self) -> None:
        """Write the settings down, if that is not done: from here on the folder is a run that can be resumed."""
        if not (self.path / SETTINGS).exists():
            write_json(self.path / SETTINGS, self.settings)

    def publish(self, files: list[str] | None = None) -> None:
        """Move the finished files into the bundle, enter them into bundle.json, and empty the work folder.

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
            remove_part(self.folder, PART)
        for name in files:
            if (self.path / name).exists():
                (self.path / name).replace(self.folder / name)
        info = {key: value for key, value in self.settings.items() if key != "fingerprint"}
        add_part(self.folder, PART, files, fingerprint=self.settings["fingerprint"], info=info)
        self.empty()

    def empty(self) -> None:
        """Remove all but the lock."""
        # without its settings the rest is rubbish that the next run sweeps away
        (self.path / SETTINGS).unlink(missing_ok=True)
        for file in self.path.iterdir():
            if file.name != LOCK:
                file.unlink()


def _already_done(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the bundle is finished with these settings. BundleError if it is with others, or is damaged."""
    entry = _finished(folder)
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


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Be the only one at work in the folder `path`, which is made, and goes again if nothing else is put into it.

    BundleError if another process is at work there.
    """
    made = [parent for parent in (path, *path.parents) if not parent.exists()] or [path]
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # its holder has just removed the folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise BundleError(
                f"another quantization is at work in {path.parent}; wait for it to end, or give another folder"
            ) from None
        if os.fstat(file).st_nlink:
            break
        os.close(file)  # the lock of a folder that was just removed
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
        os.close(file)


@contextmanager
def open_work(
    folder: Path, source: Path, settings: Mapping[str, Any], *, overwrite: bool
) -> Iterator[WorkFolder | None]:
    """The work folder for these settings, new or to be resumed (see `begin`); None if the bundle is finished with them.

    settings: JSON values, with the source's "fingerprint". BundleError if the folder is the checkpoint itself or holds
    something else, if a run was begun or finished with other settings (unless `overwrite`), if its ViT is another
    model's, or if another process is at work there: nobody else is while the context lasts.
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
    # asked without the lock where nothing is to be swept away: a finished bundle is only read
    if not overwrite and not work.path.exists() and _already_done(folder, settings):
        yield None
        return
    with _locked(work.path):
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
