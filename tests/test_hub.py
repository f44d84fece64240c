"""Models by name, against a stand-in for both hubs on loopback: what is asked, cut, damaged, offline."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hub as stand_in
import huggingface_hub.constants
import huggingface_hub.file_download
import modelscope_hub
import pytest
import torch
from conftest import GOLDEN, write_small_checkpoint
from hub import Hub
from safetensors.torch import save_file

import export.vit
import quantize.gptq
import qvl_edge.demo
from export.part import export_vit
from quantize.job import quantize_checkpoint
from qvl_edge import BundleError, CheckpointError, ConfigError, QvlError, Runtime
from qvl_edge.__main__ import main
from qvl_edge.bundle import Bundle
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.compat import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, snapshot_download
from qvl_edge.config import QuantConfig
from qvl_edge.files import sha256_of
from qvl_edge.hub import fetch, local_folder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
DEMO = Path(qvl_edge.demo.__file__).parent / "checkpoint"
PICTURE = GOLDEN / "tiny-a/images/scene0_RGB.png"
NAME, SMALL, SHARD = "Qwen/Qwen-VL-Chat", "owner/small", "model.safetensors"
NEEDED = {path.name for path in DEMO.iterdir()}
READ = 10 << 20  # bytes that huggingface_hub reads at once: what came after the last of them is lost with a connection
CUT = READ + 1_000_000  # of the 14 MB shard


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, bytes]]]:
    small = stand_in.files_of(write_small_checkpoint(tmp_path_factory.mktemp("hub") / "small"))
    demo = stand_in.files_of(DEMO) | {"pytorch_model.bin": b"the same weights again, in the other format"}
    return {NAME: {"main": demo, "master": demo}, SMALL: {"main": small, "master": small}}


@pytest.fixture
def hub(contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Both hubs, empty caches, and no settings of the machine's user."""
    with stand_in.running({name: dict(branches) for name, branches in contents.items()}) as hub:
        for variable in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "MODELSCOPE_API_TOKEN"):
            monkeypatch.delenv(variable, raising=False)
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": tmp_path / "hf", "XDG_CACHE_HOME": tmp_path / "xdg"}
        settings |= {"MODELSCOPE_ENDPOINT": hub.url, "MODELSCOPE_CACHE": tmp_path / "modelscope"}
        for variable, value in settings.items():
            monkeypatch.setenv(variable, str(value))
        # huggingface_hub reads its variables when it is imported, which has happened here
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf/hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf/token"))
        modelscope_hub.set_default_config(modelscope_hub.HubConfig())
        yield hub


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def same(folder: Path, hub: Hub, name: str) -> bool:
    files = hub.repos[name]["main"]
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return bool(found) and all((folder / file).read_bytes() == files[file] for file in found)


def names(hub: Hub) -> set[str]:
    return {request.file for request in hub.fetched()}


# a model's name in place of a folder


@pytest.mark.slow
def test_a_name_is_fetched_and_answers_and_then_needs_no_network(
    hub: Hub, vit_cache: Path, request: pytest.FixtureRequest
) -> None:
    said: list[str] = []
    runtime = Runtime.from_pretrained(NAME, device="cpu", cache_dir=vit_cache, progress=said.append)
    answer = runtime.ask(PICTURE, "这是什么?", max_new_tokens=8, do_sample=False)
    assert names(hub) == NEEDED  # no code, no pictures, no font, and the weights in one format
    assert any(f"{len(NEEDED)} files" in line for line in said) and any(SHARD in line for line in said)
    request.getfixturevalue("no_network")
    asked = len(hub.requests)
    again = Runtime.from_pretrained(NAME, device="cpu", cache_dir=vit_cache)
    local = Runtime.from_pretrained(DEMO, device="cpu", cache_dir=vit_cache)
    for other in (again, local):
        assert other.ask(PICTURE, "这是什么?", max_new_tokens=8, do_sample=False).token_ids == answer.token_ids
    assert len(hub.requests) == asked


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    source = Checkpoint(write_small_checkpoint(folder / "source"))
    quantize_checkpoint(source, folder / "bundle", QuantConfig(), None)
    export_vit(source, folder / "bundle")
    (folder / "bundle/README.md").write_text("# no part of it")
    (folder / "bundle/old.safetensors").write_text("nor this")
    return folder / "bundle"


def ask(folder: str | Path) -> str:
    return Runtime.from_pretrained(folder, device="cpu").ask(PICTURE, "hi", max_new_tokens=4, do_sample=False).text


def test_a_bundle_is_fetched_as_its_manifest_lists_it(
    hub: Hub, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = stand_in.files_of(bundle)
    hub.repos["me/bundle"] = {"main": files, "master": files}
    listed = {"bundle.json"}.union(*(part["files"] for part in Bundle.open(bundle).parts.values()))
    assert {"quantize_report.json", "vit.onnx.data"} < listed < set(files)
    assert ask("me/bundle") == ask(bundle)
    assert names(hub) == listed
    assert all(path.is_symlink() for path in local_folder("me/bundle").iterdir())
    Bundle.open(fetch("me/bundle", to=tmp_path / "plain"), verify=True)
    Bundle.open(local_folder("me/bundle", source="modelscope"), verify=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no record"))
    folder = local_folder("me/bundle")
    Bundle.open(folder, verify=True)
    (folder / "quantize_report.json").unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no record again"))
    with pytest.raises(CheckpointError, match="nor complete in the cache"):
        local_folder("me/bundle")


def test_a_bundle_that_lacks_a_file_of_its_manifest_on_the_hub_is_refused(hub: Hub, bundle: Path) -> None:
    files = stand_in.files_of(bundle)
    del files["vit.onnx.data"]
    hub.repos["me/bundle"] = {"main": files}
    with pytest.raises(CheckpointError, match="has no vit.onnx.data, which its bundle.json lists"):
        local_folder("me/bundle")


def test_an_adapter_is_fetched_by_name(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_small_checkpoint(tmp_path / "base")
    name, settings = "lm_head", {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["lm_head"]}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    parts = {f"base_model.model.{name}.lora_A.weight": torch.ones(1, 128)}
    parts |= {f"base_model.model.{name}.lora_B.weight": torch.ones(512, 1)}
    save_file(parts, tmp_path / "adapter/adapter_model.safetensors")
    hub.repos["me/adapter"] = {"main": stand_in.files_of(tmp_path / "adapter")}
    bundle = tmp_path / "bundle"
    assert quantize.gptq.main([str(base), str(bundle), "--lora", "me/adapter", "--round-to-nearest"]) == 0
    found = Checkpoint(bundle)[f"{name}.weight"].float() - Checkpoint(base)[f"{name}.weight"].float()
    assert torch.allclose(found, torch.ones_like(found), atol=2e-3)
    with pytest.raises(CheckpointError, match=f"is an adapter.*\n  {base} --lora"):
        Runtime.from_pretrained("me/adapter", device="cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no record"))
    fetched = {path.name for path in local_folder("me/adapter").iterdir()}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_cache_is_hugging_faces_own_with_one_copy(hub: Hub) -> None:
    folder = local_folder(SMALL)
    assert Path(huggingface_hub.hf_hub_download(SMALL, SHARD, local_files_only=True)) == folder / SHARD
    cache = folder.parents[1]
    kept = [path for path in cache.rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in kept if path.parent.name == "blobs") == sum(
        path.stat().st_size for path in folder.iterdir()
    )


def test_a_folder_wins_over_a_name_without_any_connection(
    no_network: None, make_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint("Qwen/Qwen-VL-Chat")
    monkeypatch.chdir(tmp_path)
    assert local_folder(NAME) == Path(NAME)
    assert Runtime.from_pretrained(NAME, device="cpu").generate("hi", max_new_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize(
    "path",
    ["./x/y", "/x/y", "a/b/c", "Qwen-VL-Chat", "x/", Path("Qwen/Qwen-VL-Chat"), "a b/c"]
    + ["o--x/n", "o/n..x", "o/n.git", "o/n-", "o./n", f"o/{'n' * 97}", f"{'o' * 97}/n", "n" * 300],
)
def test_what_is_neither_a_folder_nor_a_name_is_said(no_network: None, path: str | Path) -> None:
    with pytest.raises(CheckpointError, match=r"is neither a local folder nor the name of a model .*OWNER/NAME"):
        Runtime.from_pretrained(path)


@pytest.mark.slow
def test_upstreams_snippets_take_names_and_fetch_only_what_they_read(hub: Hub, vit_cache: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(NAME, trust_remote_code=True)
    assert names(hub) == {"qwen.tiktoken"}
    config = GenerationConfig.from_pretrained(NAME, trust_remote_code=True)
    assert names(hub) == {"qwen.tiktoken", "generation_config.json"} and config.chat_format == "chatml"
    model = AutoModelForCausalLM.from_pretrained(NAME, device_map="cpu", cache_dir=vit_cache).eval()
    response, _ = model.chat(tokenizer, query="hi", history=None, max_new_tokens=2)
    assert isinstance(response, str) and names(hub) == NEEDED
    assert len(hub.fetched()) == len(NEEDED)  # none of them twice


@pytest.mark.parametrize("source", ["hf", "modelscope"])
def test_a_file_that_the_hub_does_not_have_is_named_and_nothing_is_fetched(hub: Hub, source: str) -> None:
    for branch in ("main", "master"):
        files = dict(hub.repos[SMALL][branch])
        del files["generation_config.json"]
        hub.repos[SMALL][branch] = files
    with pytest.raises(CheckpointError, match="has no generation_config.json on the hub"):
        GenerationConfig.from_pretrained(SMALL, source=source)
    assert not names(hub)


def test_an_option_that_would_be_dropped_is_refused(hub: Hub) -> None:
    for call in (AutoTokenizer.from_pretrained, snapshot_download):
        with pytest.raises(ConfigError, match="cache_dir, local_file_only cannot be chosen here"):
            call(SMALL, local_file_only=True, cache_dir="elsewhere")
    assert not hub.requests


def test_fit_fetches_the_settings_alone(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", SMALL, "--cpu", "4GB"]) == 0
    assert "longest context" in capsys.readouterr().out and names(hub) == {"config.json"}
    before = len(hub.requests)
    assert main(["fit", "Qwen/Qwen-VL-Chat-Int4", "--cpu", "40GB"]) == 0  # by its published numbers
    assert len(hub.requests) == before


def test_both_writers_take_a_name(hub: Hub, tmp_path: Path) -> None:
    assert quantize.gptq.main([SMALL, str(tmp_path / "bundle"), "--round-to-nearest", "--device", "cpu"]) == 0
    assert export.vit.main([SMALL, str(tmp_path / "bundle"), "--source", "hf"]) == 0
    assert Runtime.from_pretrained(tmp_path / "bundle", device="cpu").config.quantization is not None


def test_pickled_weights_are_fetched_where_there_are_no_others(hub: Hub) -> None:
    files = dict(hub.repos[SMALL]["main"])
    files["pytorch_model.bin"] = files.pop(SHARD)
    hub.repos[SMALL]["main"] = files
    assert "pytorch_model.bin" in {path.name for path in local_folder(SMALL).iterdir()}


def test_what_is_here_is_used_until_pull_asks_the_hub_again(hub: Hub) -> None:
    first = local_folder(SMALL)
    old = hub.repos[SMALL]["main"]
    hub.repos[SMALL] = {"main": old | {"config.json": old["config.json"].replace(b"8192", b"4096")}, "v1": old}
    assert local_folder(SMALL) == first == local_folder(SMALL, revision="v1")
    second = fetch(SMALL)
    assert second != first and same(second, hub, SMALL) and local_folder(SMALL) == second
    assert local_folder(SMALL, revision="v1") == first
    assert [request.file for request in hub.fetched()].count(SHARD) == 1  # all of them have the same weights


# cut connections


def test_a_cut_shard_goes_on_with_a_range_in_the_same_process(hub: Hub) -> None:
    hub.cut[SHARD] = CUT
    folder = local_folder(NAME)
    assert [request.range for request in hub.fetched() if request.file == SHARD] == [None, f"bytes={READ}-"]
    assert same(folder, hub, NAME)


@pytest.mark.slow
def test_a_killed_download_resumes_and_fetches_no_more_than_one_file_again(hub: Hub) -> None:
    extra = {name: name.encode() * 1000 for name in ("extra-1.safetensors", "n-2.safetensors")}
    hub.repos[NAME] = {branch: files | extra for branch, files in hub.repos[NAME].items()}
    hub.stall[SHARD] = CUT
    command = [sys.executable, "-m", "qvl_edge", "pull", NAME]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert hub.stalled.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert SHARD in names(hub)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert Counter(request.file for request in hub.fetched()) == Counter([*NEEDED, *extra, SHARD])
    assert same(Path(done.stdout.strip()), hub, NAME) and f"{len(NEEDED) + 2} files" in done.stderr
    assert "it/s" not in done.stderr  # a bar is drawn on a terminal only


def test_a_hub_that_stays_away_is_said_with_the_command_that_goes_on(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = huggingface_hub.file_download

    def gone(*_: object, **__: object) -> None:
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(client, "http_get", gone)
    with pytest.raises(CheckpointError, match=r"(?s)reset by peer.*kept.*qvl-edge pull owner/small --revision main"):
        local_folder(SMALL, revision="main")
    with pytest.raises(
        CheckpointError, match=r"(?s)reset by peer.*kept.*qvl-edge pull owner/small --to '.*/my model'$"
    ):
        fetch(SMALL, to=tmp_path / "my model")


def test_a_file_longer_than_listed_is_refused_and_nothing_of_it_stays(hub: Hub, tmp_path: Path) -> None:
    hub.endless.add(SHARD)
    listed = len(hub.repos[SMALL]["main"][SHARD])
    with pytest.raises(CheckpointError, match=rf"(?s)size {listed} but has size {48 << 20}.*qvl-edge pull {SMALL}"):
        fetch(SMALL, to=tmp_path / "carried")
    assert not any(path.stat().st_size > listed for path in tmp_path.rglob("*"))
    hub.endless.clear()
    assert same(fetch(SMALL, to=tmp_path / "carried"), hub, SMALL)


# hashes


@pytest.mark.parametrize("to", [None, "carried"])
def test_damaged_weights_are_fetched_again_and_then_refused(hub: Hub, to: str | None, tmp_path: Path) -> None:
    hub.damaged.add(SHARD)
    target = tmp_path / to if to else None
    expected = stand_in.sha256(hub.repos[SMALL]["main"][SHARD])
    content = hub.repos[SMALL]["main"][SHARD]
    arrived = stand_in.sha256(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(CheckpointError, match=rf"(?s){SHARD} is damaged.*{arrived}.*{expected}.*qvl-edge pull {SMALL}"):
        fetch(SMALL, to=target)
    assert [request.file for request in hub.fetched()].count(SHARD) == 2
    assert not list(tmp_path.rglob(SHARD))
    hub.damaged.clear()
    assert same(fetch(SMALL, to=target), hub, SMALL)


def test_small_files_are_checked_by_their_git_hash(hub: Hub) -> None:
    hub.damaged.add("qwen.tiktoken")
    with pytest.raises(CheckpointError, match=r"qwen.tiktoken is damaged: .* git sha1"):
        local_folder(SMALL)
    hub.damaged.clear()
    assert same(local_folder(SMALL), hub, SMALL)


def test_a_file_is_hashed_once_and_again_only_when_it_changed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr("qvl_edge.hub.sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    folder = local_folder(SMALL)
    assert len(hashed) == 1
    assert local_folder(SMALL) == folder and fetch(SMALL) == folder and len(hashed) == 1
    blob = (folder / SHARD).resolve()
    blob.write_bytes(b"\0" + blob.read_bytes()[1:])
    said: list[str] = []
    assert same(local_folder(SMALL, progress=said.append), hub, SMALL)
    assert any(f"{SHARD} is damaged" in line and "fetching it again" in line for line in said)
    assert len(hashed) == 3  # what was found, and what was fetched for it


def test_a_record_that_is_none_is_written_anew(hub: Hub) -> None:
    folder = local_folder(SMALL)
    record = next((Path(os.environ["XDG_CACHE_HOME"]) / "qvl_edge/downloads").glob("*.json"))
    whole = json.loads(record.read_text())
    part = {**whole, "files": [{"name": SHARD, "bytes": 1}]}
    other = {**whole, "files": [{**whole["files"][0], "more": 1}]}
    older = {**whole, "files": {SHARD: whole["files"][0]}}
    for content in ({}, [], {"folder": "."}, {"files": []}, {"folder": 1, "files": []}, part, other, older, "{"):
        for again in (local_folder, fetch):
            record.write_text(content if content == "{" else json.dumps(content))
            assert again(SMALL) == folder and json.loads(record.read_text()) == whole
    assert [request.file for request in hub.fetched()].count(SHARD) == 1


def test_a_damaged_file_of_the_users_own_stays_where_the_cache_has_a_link_to_it(hub: Hub, tmp_path: Path) -> None:
    link = local_folder(SMALL) / SHARD
    own = tmp_path / "own.safetensors"
    own.write_bytes(bytes(8))
    link.unlink()
    link.symlink_to(own)
    assert same(local_folder(SMALL), hub, SMALL)
    assert own.read_bytes() == bytes(8) and link.resolve() != own


# offline


def test_offline_and_absent_names_the_command(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in ("hf", "modelscope"):
        with pytest.raises(CheckpointError, match=rf"(?s)HF_HUB_OFFLINE.*qvl-edge pull {SMALL}.*--to FOLDER"):
            local_folder(SMALL, source=source)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(CheckpointError, match="local_files_only"):
        Runtime.from_pretrained(SMALL, local_files_only=True)
    assert not hub.requests


def test_a_cache_that_another_program_filled_is_used_offline_and_checked(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(huggingface_hub.snapshot_download(SMALL, ignore_patterns=["assets/*"]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(hub.requests)
    assert local_folder(SMALL) == folder
    blob = (folder / SHARD).resolve()
    blob.write_bytes(b"\0" + blob.read_bytes()[1:])
    with pytest.raises(CheckpointError, match=f"{SHARD} is damaged"):
        local_folder(SMALL)
    with pytest.raises(CheckpointError, match=f"{SHARD} is damaged"):  # as often as it is asked for
        local_folder(SMALL)
    assert len(hub.requests) == asked
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert same(local_folder(SMALL), hub, SMALL)


def test_a_cache_without_the_weights_is_not_a_model(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub.snapshot_download(SMALL, allow_patterns=["*.json", "*.tiktoken"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="nor complete in the cache"):
        local_folder(SMALL)


def test_a_hub_out_of_reach_is_as_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(huggingface_hub.snapshot_download(SMALL))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        assert local_folder(SMALL) == folder
        with pytest.raises(CheckpointError, match=r"(?s)cannot be reached.*qvl-edge pull owner/other\n.*--to FOLDER"):
            local_folder("owner/other")
        with pytest.raises(CheckpointError, match=r"(?s)cannot be reached.*qvl-edge pull owner/other --to there$"):
            fetch("owner/other", to=Path("there"))


# refusals


def test_an_unknown_name_or_revision_is_said(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)owner/typo is not a local folder, and the hub has no such model"):
        local_folder("owner/typo")
    longest = f"{'o' * 96}/{'n' * 96}"
    with pytest.raises(CheckpointError, match=f"{longest} is not a local folder, and the hub has no such model"):
        local_folder(longest)
    with pytest.raises(CheckpointError, match="no such model.* at revision v9"):
        local_folder(SMALL, revision="v9")
    with pytest.raises(CheckpointError, match="no such model.* at revision v9"):
        local_folder(SMALL, revision="v9", source="modelscope")
    with pytest.raises(QvlError, match="source is 'ftp'"):
        local_folder(SMALL, source="ftp")


def test_a_token_goes_to_the_hub_and_not_to_its_storage_host(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    with pytest.raises(CheckpointError, match="HF_TOKEN"):
        local_folder(SMALL)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.requests.clear()
    assert same(local_folder(SMALL), hub, SMALL)
    hosts = {request.host: request.token for request in hub.requests}
    assert hosts == {"127.0.0.1": "Bearer hf_secret", "localhost": None}


@pytest.mark.parametrize(("source", "module"), [("hf", "huggingface_hub"), ("modelscope", "modelscope_hub")])
def test_a_missing_client_is_named_with_its_extra(source: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    extra = {"hf": "download"}.get(source, source)
    with pytest.raises(QvlError, match=rf"pip install 'qvl-edge\[{extra}\]'"):
        local_folder("owner/absent", source=source)


def test_a_disk_too_small_is_said_before_anything_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(BundleError, match="free some space"):
        local_folder(SMALL)
    assert not hub.fetched()


# qvl-edge pull


@pytest.mark.parametrize("source", ["hf", "modelscope"])
def test_pull_says_what_it_fetches_and_puts_plain_files_where_they_are_wanted(
    hub: Hub, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "carried"
    assert main(["pull", SMALL, "--source", source, "--to", str(target)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{target}\n" and SHARD in said.err and "to fetch" in said.err
    assert same(target, hub, SMALL) and not any(path.is_symlink() for path in target.iterdir())
    assert Checkpoint(target).config.hidden_size == 128
    once = len(hub.fetched())
    assert main(["pull", SMALL, "--source", source, "--to", str(target)]) == 0 and len(hub.fetched()) == once
    (target / "config.json").write_text("{}")  # a file of the user's own
    assert main(["pull", SMALL, "--source", source, "--to", str(target)]) == 1
    assert "is another file" in capsys.readouterr().err and (target / "config.json").read_text() == "{}"


def test_a_listing_writes_nowhere_but_into_its_folder(hub: Hub, tmp_path: Path) -> None:
    evil = {"../evil.tiktoken": b"x", "sub/evil.tiktoken": b"x"}
    evil |= {"*.safetensors": b"x", "../../evil.safetensors": b"x"}  # the first is a pattern that matches the second
    hub.repos[SMALL] = {branch: files | evil for branch, files in hub.repos[SMALL].items()}
    for source in ("hf", "modelscope"):
        fetch(SMALL, source=source, to=tmp_path / "parent" / source)
    assert not list(tmp_path.rglob("evil*")) and not names(hub) & set(evil)


@pytest.mark.parametrize(("source", "suffix"), [("hf", "partial"), ("modelscope", "incomplete")])
def test_a_partial_file_that_is_a_link_is_not_written_through(
    hub: Hub, source: str, suffix: str, tmp_path: Path
) -> None:
    own = tmp_path / "own.bin"
    own.write_bytes(b"mine")
    target = tmp_path / "carried"
    target.mkdir()
    (target / f"{SHARD}.{suffix}").symlink_to(own)
    with pytest.raises(CheckpointError, match=rf"{SHARD}.{suffix} is a link to {own}.*remove the link"):
        fetch(SMALL, source=source, to=target)
    assert own.read_bytes() == b"mine" and SHARD not in names(hub)


def test_pull_of_something_else_than_a_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "./somewhere"]) == 1
    assert "OWNER/NAME" in capsys.readouterr().err


# ModelScope


def test_modelscopes_snippet_runs_and_then_needs_no_network(
    hub: Hub, vit_cache: Path, request: pytest.FixtureRequest
) -> None:
    model_dir = snapshot_download(NAME)
    assert {path.name for path in Path(model_dir).iterdir()} == NEEDED == names(hub) and same(
        Path(model_dir), hub, NAME
    )
    request.getfixturevalue("no_network")
    assert snapshot_download(NAME) == model_dir
    runtime = Runtime.from_pretrained(NAME, source="modelscope", device="cpu", cache_dir=vit_cache)
    assert runtime.generate("hi", max_new_tokens=1).usage.completion_tokens == 1


def test_a_cut_shard_goes_on_with_a_range_from_modelscope_too(hub: Hub) -> None:
    hub.cut[SHARD] = CUT
    folder = local_folder(NAME, source="modelscope")
    first, second = (request.range for request in hub.fetched() if request.file == SHARD)
    assert first is None and second and 0 < int(second.removeprefix("bytes=").rstrip("-")) <= CUT
    assert same(folder, hub, NAME)


def test_damaged_bytes_from_modelscope_are_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0.01)
    hub.damaged.add(SHARD)
    with pytest.raises(CheckpointError, match=r"(?s)1 of \d+ file.*--source modelscope"):
        local_folder(SMALL, source="modelscope")
    assert not list(Path(os.environ["MODELSCOPE_CACHE"]).rglob(f"{SHARD}*"))


def test_what_modelscope_has_kept_is_used_offline_and_a_later_change_is_found(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = local_folder(SMALL, source="modelscope")
    kept = json.loads(next((Path(os.environ["XDG_CACHE_HOME"]) / "qvl_edge/downloads").glob("*.json")).read_text())
    assert {file["name"]: file["hash"] for file in kept["files"]}[SHARD] == stand_in.sha256(
        hub.repos[SMALL]["main"][SHARD]
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert local_folder(SMALL, source="modelscope") == folder
    shard = folder / SHARD
    shard.write_bytes(b"\0" + shard.read_bytes()[1:])
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"{SHARD} is damaged"):
            local_folder(SMALL, source="modelscope")
    shard.unlink()
    with pytest.raises(CheckpointError, match="nor complete in the cache"):  # rather than a model without its weights
        local_folder(SMALL, source="modelscope")
