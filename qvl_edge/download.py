"""Models by name, OWNER/NAME on a hub: fetched once into the cache of the hub's own client, checked, used from there.

Fetched are settings, tokenizer and weights (NEEDED), never code or pictures. A file that was cut goes on where it was,
also in another process. Every file is hashed once against what the hub lists, sha256 for weights and git's sha1 for
small files; which ones were is kept in ~/.cache/qvl_edge/downloads, so a model that is complete is opened without a
word to the network. `qvl-edge pull` asks the hub again.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any

from qvl_edge.bundle import MANIFEST, VIT, VIT_DATA, check_free_space, write_json
from qvl_edge.checkpoint import BIN_INDEX, SAFETENSORS_INDEX
from qvl_edge.config import read_json
from qvl_edge.errors import CheckpointError, ConfigError, QvlError
from qvl_edge.hubs import Hub, HuggingFace, ModelScope, RemoteFile, Source, difference, size_text
from qvl_edge.vit_cache import Progress, cache_home

HUBS: dict[str, type[Hub]] = {hub.source: hub for hub in (HuggingFace, ModelScope)}
NEEDED = (
    *("config.json", "generation_config.json", "quantize_config.json", "tokenizer_config.json", "*.tiktoken"),
    *("*.safetensors", SAFETENSORS_INDEX, "pytorch_model*.bin", BIN_INDEX),
    *(MANIFEST, VIT, VIT_DATA),
)
WEIGHTS = (".safetensors", ".bin")
# the hubs' own rule; the limit also keeps the files that are named after both halves under a file system's 255
_HALF = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
_NAME = re.compile(rf"(?!.*(?:--|\.\.|\.git$)){_HALF}/{_HALF}", re.ASCII)


def local_folder(
    path: str | PathLike[str],
    *,
    source: Source = "hf",
    revision: str | None = None,
    only: Sequence[str] | None = None,
    local_files_only: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The folder at `path`; or, for a str OWNER/NAME that is no folder here, that of the hub's model.

    A model that is here and was checked is returned without any look at the network. only: names of the files that are
    wanted, of which the first must be there (default: all that match NEEDED). CheckpointError if `path` is neither, if
    the model or a wanted file is not here and cannot be fetched (or may not: local_files_only, HF_HUB_OFFLINE), and for
    a file whose hash is wrong; ConfigError for an unknown source, QvlError for a client that is not installed,
    BundleError for a disk too small.
    """
    if os.path.exists(path):  # Path.exists raises for a name that is too long
        return Path(path)
    if not isinstance(path, str) or not _NAME.fullmatch(path):
        raise CheckpointError(
            f"{path} is not a folder here, nor the name of a model on a hub (OWNER/NAME, such as "
            "Qwen/Qwen-VL-Chat-Int4); give the folder that holds config.json and the weights, or such a name"
        )
    record = _Record(path, source, revision)
    if (folder := record.folder(only)) is not None:
        return folder
    offline = local_files_only or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    hub = HUBS[source](path, revision, None, progress or (lambda _: None))
    with record.alone():  # another process may have fetched it meanwhile
        return record.folder(only) or _fetch(hub, record, only, offline=offline)


def fetch(
    name: str,
    *,
    source: Source = "hf",
    revision: str | None = None,
    to: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Ask the hub what `name` is now and fetch what is not here; its folder, or `to`, where plain files are wanted.

    CheckpointError for a name that the hub does not have, a connection that stays cut, and a wrong hash; BundleError
    if the disk is too small.
    """
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{name} is no name of a model on a hub; give OWNER/NAME, such as Qwen/Qwen-VL-Chat-Int4")
    record = _Record(name, source, revision)
    hub = HUBS[source](name, revision, to, progress or (lambda _: None))
    with record.alone():
        return _fetch(hub, record, None, offline=False)


class _Record:
    """What is known to be here of one model at one revision: its folder, and each file's size, hash and check."""

    def __init__(self, name: str, source: Source, revision: str | None):
        if source not in HUBS:
            raise ConfigError(f"source is {source!r}, known are {', '.join(HUBS)}")
        self.name, self.source, self.revision = name, source, revision
        key = hashlib.sha256(f"{source} {name} {revision}".encode()).hexdigest()[:8]
        self.file = cache_home() / "downloads" / f"{name.replace('/', '--')}-{key}.json"
        self.content = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            content = read_json(self.file)
            for name, entry in content["files"].items():
                RemoteFile(name, entry["bytes"], entry["hash"])
                entry["checked_mtime_ns"]
            return {"folder": str(content["folder"]), "files": content["files"]}
        except (QvlError, OSError, LookupError, TypeError, AttributeError):  # no record: everything is checked again
            return {"folder": "", "files": {}}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process fetches this model, and read what it has written."""
        from filelock import FileLock  # torch and both clients bring it

        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.file.with_suffix(".lock")):
            self.content = self._read()
            yield

    def folder(self, only: Sequence[str] | None) -> Path | None:
        """The model's folder, if every wanted file is there as it was when it was checked."""
        folder = Path(self.content["folder"])
        names = [name for name in self.content["files"] if only is None or name in only]
        return folder if names and all(self._unchanged(folder, name) for name in names) else None

    def _unchanged(self, folder: Path, name: str) -> bool:
        try:
            found = (folder / name).stat()
        except OSError:
            return False
        known = self.content["files"][name]
        return (known["bytes"], known["checked_mtime_ns"]) == (found.st_size, found.st_mtime_ns)

    def check(self, folder: Path, listed: Iterable[RemoteFile], wanted: Iterable[RemoteFile], hub: Hub) -> None:
        """Hash the wanted files that have not been yet, and keep that."""
        known = {name: entry for name, entry in self.content["files"].items() if str(folder) == self.content["folder"]}
        files = {file.name: {"bytes": file.bytes, "hash": file.hash, "checked_mtime_ns": None} for file in listed}
        for name, entry in files.items():
            before = known.get(name)
            if before and before["hash"] == entry["hash"] and self._unchanged(folder, name):
                entry["checked_mtime_ns"] = before["checked_mtime_ns"]
        for file in wanted:
            if files[file.name]["checked_mtime_ns"] is None:
                if file.hash not in hub.hashed:
                    hub.check(folder / file.name, file)
                files[file.name]["checked_mtime_ns"] = (folder / file.name).stat().st_mtime_ns
        self.content = {"folder": str(folder), "files": files}
        write_json(self.file, {"name": self.name, "source": self.source, "revision": self.revision, **self.content})


def _fetch(hub: Hub, record: _Record, only: Sequence[str] | None, *, offline: bool) -> Path:
    try:
        if offline:
            return _already_here(hub, record, only, "fetching is off (local_files_only or HF_HUB_OFFLINE)")
        try:
            listed = _needed(hub.listing())
        except QvlError:
            raise
        except Exception as error:  # the clients raise what the HTTP library of their version raises
            return _already_here(hub, record, only, f"the hub cannot be reached ({error})")
        wanted = [file for file in listed if only is None or file.name in only]
        if only and only[0] not in {file.name for file in wanted}:
            raise CheckpointError(f"{hub.name} at {hub.commit} has no {only[0]} on the hub")
        if only is None and not any(file.name.endswith(WEIGHTS) for file in wanted):
            raise CheckpointError(f"{hub.name} has neither *.safetensors nor pytorch_model*.bin on the hub")
        if hub.to is not None:
            _check_target(hub, hub.to, wanted)
        _announce(hub, wanted, say=hub.say if only is None else lambda _: None)
        folder = hub.fetch(wanted)
    except QvlError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{hub.name} cannot be fetched: {type(error).__name__}: {error}\nwhat has arrived is kept; go on with:\n"
            f"  {hub.command}"
        ) from error
    if hub.to is not None:
        for file in wanted:
            if file.hash not in hub.hashed:
                hub.check(folder / file.name, file)
        return folder
    record.check(folder, listed, wanted, hub)
    return folder


def _check_target(hub: Hub, folder: Path, wanted: list[RemoteFile]) -> None:
    """CheckpointError if a file in `folder` is another one than the model's: what is the user's is not replaced."""
    for file in wanted:
        if not (folder / file.name).exists():
            continue
        if found := difference(folder / file.name, file):
            raise CheckpointError(f"{folder / file.name} is another file: {found}. Remove it, or take another folder")
        hub.hashed.add(file.hash)


def _announce(hub: Hub, wanted: list[RemoteFile], *, say: Progress) -> None:
    """Say what will be fetched, and how much. BundleError if the disk is too small for it."""
    missing = {file: file.bytes - hub.bytes_here(file) for file in wanted}
    total, left = sum(file.bytes for file in wanted), sum(missing.values())
    say(f"{hub.name} at {hub.commit}: {len(wanted)} files, {size_text(total)}, {size_text(left)} of it to fetch")
    for file, rest in missing.items():
        say(f"  {size_text(file.bytes):>10}  {file.name}" + ("" if rest else " (here)"))
    space = hub.place
    while not space.exists():
        space = space.parent
    check_free_space(space, left)


def _already_here(hub: Hub, record: _Record, only: Sequence[str] | None, reason: str) -> Path:
    """What the client's cache holds, put there by another program or copied from another machine."""
    folder = hub.cached() if hub.to is None else None
    if folder is not None:
        known = record.content["files"] if record.content["folder"] == str(folder) else {}
        listed = _needed(
            RemoteFile(path.name, path.stat().st_size, known.get(path.name, {}).get("hash") or hub.hash_of(path))
            for path in folder.iterdir()
        )
        expected = only[:1] if only else [*known, "config.json"]
        weights = only is not None or any(file.name.endswith(WEIGHTS) for file in listed)
        if weights and set(expected) <= {file.name for file in listed}:
            wanted = [file for file in listed if only is None or file.name in only]
            record.check(folder, listed, wanted, hub)
            return folder
    carry = (
        f"\nor bring its folder from another machine, made there by\n  {hub.command} --to FOLDER\nand give that folder"
    )
    raise CheckpointError(
        f"{hub.name} is not here, neither as a folder nor in the cache, and {reason}. Fetch it where there is a "
        f"network:\n  {hub.command}" + (carry if hub.to is None else "")
    )


def _needed(files: Iterable[RemoteFile]) -> list[RemoteFile]:
    """Those at the top that match NEEDED; of weights in both formats, the safetensors, as Checkpoint chooses."""
    found = [file for file in files if any(fnmatchcase(file.name, pattern) for pattern in NEEDED)]
    # a name is never a path elsewhere, nor a pattern: ModelScope's client takes names as patterns, and lists once more
    found = [file for file in found if not set("/\\*?[]") & set(file.name)]
    if any(file.name.endswith(".safetensors") for file in found):
        found = [file for file in found if not file.name.startswith("pytorch_model")]
    return sorted(found, key=lambda file: (file.bytes, file.name))
