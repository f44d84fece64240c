"""Models by name, OWNER/NAME on a hub: fetched once into the cache of the hub's own client, checked, used from there.

Only settings, tokenizer and weights are fetched (NEEDED, or what a bundle's manifest lists), never code or pictures.
Hugging Face's client checks no more than sizes, so every file is hashed once against what the hub lists: sha256 for
weights, git's sha1 for small files. A record of that in ~/.cache/qvl_edge/downloads lets a complete model open without
the network; `qvl-edge pull` asks the hub again. After a kill the same command resumes, and fetches at most one shard
twice.

The clients' own settings hold: HF_ENDPOINT, HF_HOME, HF_TOKEN; MODELSCOPE_ENDPOINT, MODELSCOPE_CACHE,
MODELSCOPE_API_TOKEN.
"""

import hashlib
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from qvl_edge.bundle import MANIFEST, read_manifest
from qvl_edge.checkpoint import ADAPTER_CONFIG, ADAPTER_FILES, WEIGHTS, is_weights
from qvl_edge.errors import CheckpointError, ConfigError, QvlError
from qvl_edge.files import cache_home, check_free_space, locked, read_json, sha256_of, write_json
from qvl_edge.memory import format_bytes
from qvl_edge.options import Source

NEEDED = (
    *("config.json", "generation_config.json", "quantize_config.json", "tokenizer_config.json", "*.tiktoken"),
    *(pattern for patterns in WEIGHTS.values() for pattern in patterns),
    *("*.index.json", ADAPTER_CONFIG, *ADAPTER_FILES, MANIFEST),
)
# the hubs' own rule; the limit also keeps the files that are named after both halves under a file system's 255
_HALF = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
_NAME = re.compile(rf"(?!.*(?:--|\.\.|\.git$)){_HALF}/{_HALF}", re.ASCII)
_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


def local_folder(
    path: str | PathLike[str],
    *,
    source: Source = "hf",
    revision: str | None = None,
    only: Sequence[str] | None = None,
    local_files_only: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """The folder at `path`; or, for a str OWNER/NAME that is not a local folder, that of the hub's model.

    A complete model that was checked is returned without touching the network. only: names of the wanted files, of
    which the first must exist (default: all that match NEEDED). CheckpointError if `path` is neither, if the model or a
    wanted file is missing and cannot be fetched (or may not: local_files_only, HF_HUB_OFFLINE), and for a file with a
    wrong hash; ConfigError for an unknown source, QvlError for a client that is not installed, BundleError if the disk
    is too small.
    """
    if not isinstance(path, str | PathLike):
        raise CheckpointError(
            f"the model is a {type(path).__name__}, expected a folder or the name of a model on a hub"
        )
    if os.path.exists(path):  # Path.exists raises for a name that is too long
        return Path(path)
    if not isinstance(path, str) or not _NAME.fullmatch(path):
        raise CheckpointError(
            f"{path} is neither a local folder nor the name of a model on a hub (OWNER/NAME, such as "
            "Qwen/Qwen-VL-Chat-Int4); give the folder that holds config.json and the weights, or such a name"
        )
    offline = local_files_only or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    model = _Model(path, source, revision, None, progress)
    return model.checked(only) or model.fetch(only, offline=offline)


def fetch(
    name: str,
    *,
    source: Source = "hf",
    revision: str | None = None,
    to: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Ask the hub for the current files of `name` and fetch the missing ones; their folder, or `to` for plain files.

    CheckpointError for a name that the hub does not have, a connection that stays cut, and a wrong hash; BundleError
    if the disk is too small.
    """
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{name!r} is not a valid model name; give OWNER/NAME, such as Qwen/Qwen-VL-Chat-Int4")
    return _Model(name, source, revision, to, progress).fetch(None, refresh=True)


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it. checked_mtime_ns: when the local file, found to be the same, was written."""

    name: str
    bytes: int
    hash: str  # sha256 (64 digits) or git's sha1 of a blob (40), "" where none is known
    checked_mtime_ns: int | None = None

    def difference(self, path: Path) -> str:
        """How the file at `path` differs from this one, "" if it does not; without a hash the size decides."""
        size = path.stat().st_size
        if size != self.bytes:
            return f"it has {size} bytes, the hub lists {self.bytes}"
        if len(self.hash) == 64:
            kind, found = "sha256", sha256_of(path)
        elif self.hash:
            kind, found = "git sha1", hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest()
        else:
            return ""
        return "" if found == self.hash else f"its {kind} is {found}, the hub lists {self.hash}"


class HuggingFace:
    """A model at one revision through huggingface_hub, whose cache links to blobs that are named by their hash."""

    package, extra, token = "huggingface_hub", "download", "HF_TOKEN"

    def __init__(self, name: str, revision: str | None):
        import huggingface_hub
        from huggingface_hub import constants, errors, utils

        class Bar(utils.tqdm):  # only on a terminal, where the client draws some of its bars in any case
            def __init__(self, *args: Any, **options: Any):
                super().__init__(*args, **{**options, "disable": options.get("disable") or None})

        self.client: Any = huggingface_hub
        self.bar = Bar
        self.name, self.revision, self.commit = name, revision or "main", ""
        self.cache = Path(constants.HF_HUB_CACHE)
        self.refusals = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)  # the first also if gated

    def list_files(self) -> list[RemoteFile]:
        """All files of the repository; also sets `commit`, what the revision is now."""
        info = self.client.HfApi().model_info(self.name, revision=self.revision, files_metadata=True)
        self.commit = info.sha
        return [RemoteFile(f.rfilename, f.size, f.lfs.sha256 if f.lfs else f.blob_id or "") for f in info.siblings]

    def _snapshot(self, files: list[RemoteFile], **options: Any) -> Any:
        # by revision rather than commit, so that the client remembers what a branch was; one file at a time, so that a
        # kill costs no more than that one
        names = [file.name for file in files]
        return self.client.snapshot_download(
            self.name, revision=self.revision, allow_patterns=names, max_workers=1, tqdm_class=self.bar, **options
        )

    def missing(self, files: list[RemoteFile]) -> list[RemoteFile]:
        """Those that are not in the cache."""
        lacking = {file.filename for file in self._snapshot(files, dry_run=True) if file.will_download}
        return [file for file in files if file.name in lacking]

    def fetch(self, files: list[RemoteFile], to: Path | None, *, again: bool = False) -> Path:
        """Fetch what is missing, or all `again`, into the folder `to` or the cache; the folder."""
        folder = Path(self._snapshot(files, local_dir=to, force_download=again))
        if to is None and folder.name != self.commit:
            raise CheckpointError(f"{self.name} at {self.revision} changed during the download; run the command again")
        return folder

    def cached(self, name: str) -> Path | None:
        """The folder in the cache that has the file `name`, found without the network."""
        found = self.client.try_to_load_from_cache(self.name, name, revision=self.revision)
        return Path(found).parent if isinstance(found, str) else None

    def hash_of(self, path: Path) -> str:
        """The hash that a file in the cache ought to have, "" if the cache does not say."""
        blob = path.readlink().name if path.is_symlink() else ""
        return blob if _HASH.fullmatch(blob) else ""


class ModelScope:
    """The same through modelscope_hub, which resumes files and checks their sha256."""

    package, extra, token = "modelscope-hub", "modelscope", "MODELSCOPE_API_TOKEN"

    def __init__(self, name: str, revision: str | None):
        from modelscope_hub import HubApi, errors, get_default_config

        self.api: Any = HubApi()
        self.name = name
        self.revision = self.commit = revision or "master"
        self.cache = Path(get_default_config().cache_dir)
        self.refusals = (errors.NotExistError, errors.AuthenticationError, errors.PermissionDeniedError)
        self.not_cached = errors.CacheNotFound

    def list_files(self) -> list[RemoteFile]:
        files = self.api.list_repo_files(self.name, "model", revision=self.revision)
        return [RemoteFile(file.path, file.size, (file.sha256 or "").lower()) for file in files if file.type != "tree"]

    def missing(self, files: list[RemoteFile]) -> list[RemoteFile]:
        return [f for f in files if (at := self.cached(f.name)) is None or (at / f.name).stat().st_size != f.bytes]

    def fetch(self, files: list[RemoteFile], to: Path | None, *, again: bool = False) -> Path:
        del again  # the client fetches whatever has not the hash that is listed
        listed = [{"Path": file.name, "Size": file.bytes, "Sha256": file.hash} for file in files]
        return Path(self.api.download_repo(self.name, "model", revision=self.revision, local_dir=to, file_list=listed))

    def cached(self, name: str) -> Path | None:
        try:
            folder = Path(self.api.download_repo(self.name, "model", revision=self.revision, local_files_only=True))
        except self.not_cached:
            return None
        return folder if (folder / name).is_file() else None

    def hash_of(self, path: Path) -> str:
        del path
        return ""


Hub: TypeAlias = HuggingFace | ModelScope
HUBS: dict[str, type[Hub]] = {"hf": HuggingFace, "modelscope": ModelScope}


class _Model:
    """A model by name, and a record on disk of its files: in which folder they are, and when they were checked."""

    def __init__(
        self, name: str, source: str, revision: str | None, to: Path | None, progress: Callable[[str], None] | None
    ):
        if source not in HUBS:
            raise ConfigError(f"source is {source!r}, known are {', '.join(HUBS)}")
        self.name, self.source, self.revision, self.to = name, source, revision, to
        self.say = progress or (lambda _: None)
        options = {"source": None if source == "hf" else source, "revision": revision, "to": to}
        given = [f" --{option} {shlex.quote(str(value))}" for option, value in options.items() if value is not None]
        self.command = f"qvl-edge pull {name}{''.join(given)}"
        key = hashlib.sha256(f"{source} {name} {revision}".encode()).hexdigest()[:8]
        self.record = cache_home() / "downloads" / f"{name.replace('/', '--')}-{key}.json"
        self._read_record()

    def _read_record(self) -> None:
        try:
            content = read_json(self.record)
            self.folder, self.files = Path(content["folder"]), [RemoteFile(**entry) for entry in content["files"]]
        except (QvlError, OSError, LookupError, TypeError):  # none, or not a record: everything is checked again
            self.folder, self.files = Path(), []

    def checked(self, only: Sequence[str] | None) -> Path | None:
        """The model's folder, if every wanted file is there as it was when it was checked."""
        wanted = [file for file in self.files if only is None or file.name in only]
        return self.folder if wanted and all(map(self._is_unchanged, wanted)) else None

    def _is_unchanged(self, file: RemoteFile) -> bool:
        try:
            found = (self.folder / file.name).stat()
        except OSError:
            return False
        return (found.st_size, found.st_mtime_ns) == (file.bytes, file.checked_mtime_ns)

    def fetch(self, only: Sequence[str] | None, *, offline: bool = False, refresh: bool = False) -> Path:
        """The model's folder, after fetching what is missing; refresh: the hub is asked even if all is here."""
        kind = HUBS[self.source]
        try:
            hub = kind(self.name, self.revision)
        except ImportError as error:
            raise QvlError(
                f"loading a model by name needs the package {kind.package} ({error}); install it with "
                f"pip install 'qvl-edge[{kind.extra}]', or give a local folder"
            ) from None
        with locked(self.record.with_suffix(".lock")):
            self._read_record()
            if not refresh and (folder := self.checked(only)):  # fetched by another process meanwhile
                return folder
            if offline:
                return self._from_cache(hub, only, "downloads are off (local_files_only or HF_HUB_OFFLINE)")
            try:
                listed = hub.list_files()
            except hub.refusals as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise CheckpointError(
                    f"{self.name} is not a local folder, and the hub has no such model, or no access for you, at "
                    f"revision {hub.revision}: {reason}\n"
                    f"Check the name; a private or gated model needs a token in {hub.token}"
                ) from None
            except Exception as error:  # the clients raise what the HTTP library of their version raises
                return self._from_cache(hub, only, f"the hub cannot be reached ({error})")
            try:
                return self._download(hub, listed, only)
            except QvlError:
                raise
            except Exception as error:
                raise CheckpointError(
                    f"{self.name} cannot be fetched: {type(error).__name__}: {error}\n"
                    f"files that have arrived are kept; resume with:\n  {self.command}"
                ) from error

    def _download(self, hub: Hub, listed: list[RemoteFile], only: Sequence[str] | None) -> Path:
        if only is None and any(file.name == MANIFEST for file in listed):
            listed, absent = _of_bundle(self._download(hub, listed, [MANIFEST]), listed)
            if absent:
                raise CheckpointError(f"{self.name} at {hub.commit} has no {absent[0]}, which its {MANIFEST} lists")
        else:
            listed = _needed(listed)
        wanted = [file for file in listed if only is None or file.name in only]
        if only and only[0] not in {file.name for file in wanted}:
            raise CheckpointError(f"{self.name} at {hub.commit} has no {only[0]} on the hub")
        if only is None and not any(_is_model(file.name) for file in wanted):
            raise CheckpointError(f"{self.name} has neither *.safetensors nor pytorch_model*.bin on the hub")
        missing = hub.missing(wanted) if self.to is None else _missing_in(self.to, wanted)
        total, left = (sum(file.bytes for file in files) for files in (wanted, missing))
        if only is None:
            what = f"{len(wanted)} files, {format_bytes(total)}, {format_bytes(left)} of it to fetch"
            self.say(f"{self.name} at {hub.commit}: {what}")
            for file in wanted:
                self.say(f"  {format_bytes(file.bytes):>10}  {file.name}{'' if file in missing else ' (here)'}")
        place = (self.to or hub.cache).absolute()
        check_free_space(next(folder for folder in (place, *place.parents) if folder.exists()), left)
        if self.to is None:
            folder = hub.fetch(wanted, None)
            self._check(folder, listed, wanted, hub)
            return folder
        if missing:
            hub.fetch(missing, self.to)
        for file in missing:
            self._verified(self.to, file, hub)
        return self.to

    def _check(self, folder: Path, listed: list[RemoteFile], wanted: list[RemoteFile], hub: Hub | None) -> None:
        """Hash the wanted files that have not been yet, and record all that are listed."""
        before = self.files if folder == self.folder else []
        checked = {(file.name, file.hash): file for file in before if self._is_unchanged(file)}
        files = [
            checked.get((file.name, file.hash)) or (self._verified(folder, file, hub) if file in wanted else file)
            for file in listed
        ]
        self.folder, self.files = folder, files
        write_json(self.record, {"folder": str(folder), "files": [asdict(file) for file in files]})

    def _verified(self, folder: Path, file: RemoteFile, hub: Hub | None) -> RemoteFile:
        """`file` with the time of its check. If it is not what the hub lists, it is fetched once more from `hub`."""
        path = folder / file.name
        found = file.difference(path)
        if found and hub is not None:
            self.say(f"{file.name} is damaged: {found}; fetching it again")
            path.unlink()  # it was fetched, or is a link, whose target stays
            hub.fetch([file], self.to, again=True)
            if found := file.difference(path):
                path.unlink()
        if found:
            raise CheckpointError(f"{file.name} is damaged: {found}. Fetch it again with:\n  {self.command}")
        return replace(file, checked_mtime_ns=path.stat().st_mtime_ns)

    def _from_cache(self, hub: Hub, only: Sequence[str] | None, reason: str) -> Path:
        """What the client's cache holds, put there by another program or copied from another machine."""
        marks = (only[0],) if only else ("config.json", ADAPTER_CONFIG)
        folder = next(filter(None, map(hub.cached, marks)), None) if self.to is None else None
        if folder is not None:
            known = {file.name: file.hash for file in self.files if folder == self.folder}
            files = [
                RemoteFile(path.name, path.stat().st_size, known.get(path.name) or hub.hash_of(path))
                for path in folder.iterdir()
                if path.is_file()
            ]
            bundle = only is None and (folder / MANIFEST).exists()
            listed, absent = _of_bundle(folder, files) if bundle else (_needed(files), [])
            names = {file.name for file in listed}
            if only or (names >= {*known} and any(map(_is_model, names)) and not absent):
                self._check(folder, listed, [file for file in listed if only is None or file.name in only], None)
                return folder
        carry = "" if self.to else "\nor on another machine with --to FOLDER, and copy that folder here"
        raise CheckpointError(
            f"{self.name} is neither a local folder nor complete in the cache, and {reason}. Fetch it with network "
            f"access:\n  {self.command}{carry}"
        )


def _missing_in(folder: Path, wanted: list[RemoteFile]) -> list[RemoteFile]:
    """The files that `folder` lacks. CheckpointError for another file in the place of one, or a link: it stays."""
    for path in folder.glob("*"):  # partial files too: a client would write to what the link leads to
        if path.is_symlink() and path.name.startswith(tuple(file.name for file in wanted)):
            raise CheckpointError(f"{path} is a link to {path.readlink()}; remove the link, or take another folder")
    missing = [file for file in wanted if not (folder / file.name).exists()]
    for file in wanted:
        if file not in missing and (found := file.difference(folder / file.name)):
            raise CheckpointError(f"{folder / file.name} is another file: {found}. Remove it, or take another folder")
    return missing


def _needed(files: Iterable[RemoteFile]) -> list[RemoteFile]:
    """Those at the top that match NEEDED; of weights in several formats, the safetensors, as Checkpoint chooses."""
    found = [file for file in files if any(fnmatchcase(file.name, pattern) for pattern in NEEDED)]
    if any(file.name.endswith(".safetensors") and is_weights(file.name) for file in found):
        others = tuple(
            f"{ending}{index}" for ending in WEIGHTS for index in ("", ".index.json") if ending != ".safetensors"
        )
        found = [file for file in found if not file.name.endswith(others)]
    return _sorted(found)


def _of_bundle(folder: Path, files: Iterable[RemoteFile]) -> tuple[list[RemoteFile], list[str]]:
    """Of `files` the manifest in `folder` and what it lists; and the names of what it lists and `files` has not."""
    names = {MANIFEST}.union(*(part["files"] for part in read_manifest(folder).values()))
    found = _sorted(file for file in files if file.name in names)
    return found, sorted(names - {file.name for file in found})


def _is_model(name: str) -> bool:
    """Whether a file holds the weights of a model or an adapter."""
    return is_weights(name) or name in ADAPTER_FILES


def _sorted(files: Iterable[RemoteFile]) -> list[RemoteFile]:
    """The smallest first. Names must not lead elsewhere, nor be patterns, which Hugging Face's client takes them as."""
    return sorted((f for f in files if not set("/\\*?[]") & set(f.name)), key=lambda file: (file.bytes, file.name))
