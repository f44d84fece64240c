"""The examples on Ray, as commands: whatever process is killed, every question gets the answer of a lone Runtime."""

import asyncio
import base64
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qvl_edge import Answer, Runtime
from qvl_edge.demo.scenes import UNSEEN, make_scene

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install -e '.[cpu,export,ray]'", allow_module_level=True)
if not Path("/proc/self/stat").exists():
    pytest.skip("processes are found in /proc, which this system does not have", allow_module_level=True)

import pyarrow.parquet as pq
from ray.exceptions import ActorDiedError

from examples.ray.cluster import SMALL_MODEL
from examples.ray.serve import PAUSE_S, TRIES, Ingress, read_question
from qvl_edge.server.guard import Access
from qvl_edge.server.refusal import Refusal

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
WAIT_S = 180  # for anything here: far more than it takes
QUESTIONS = (
    "Describe the picture with boxes.",
    "描述这张图并框出图形。",
    "How many shapes are there?",
    "印着什么数字？",
)
SCENES = 6


def png(seed: int) -> bytes:
    file = io.BytesIO()
    make_scene(UNSEEN + seed).image.save(file, "PNG")
    return file.getvalue()


def data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home for the commands: Ray keeps a token there, and the vision tower is exported into its cache."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def lone(home: Path) -> Callable[[bytes, str], Answer]:
    """The greedy answer of a Runtime that does nothing else."""
    runtime = Runtime.from_pretrained(SMALL_MODEL, device="cpu", cache_dir=home / ".cache/qvl_edge")
    return lambda image, question: runtime.ask(image, question, do_sample=False)


def start(home: Path, module: str, *arguments: object) -> "subprocess.Popen[str]":
    """python -m examples.ray.MODULE, on two cores of a Ray of its own; its stdout can be read."""
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    command = [sys.executable, "-m", f"examples.ray.{module}", *map(str, arguments)]
    with open(home / f"{module}.stderr", "w") as stderr:
        return subprocess.Popen(
            command, cwd=ROOT, env={**environment, "HOME": str(home)}, stdout=subprocess.PIPE, stderr=stderr, text=True
        )


def line_with(process: "subprocess.Popen[str]", words: str) -> str:
    """The next line of its stdout that has `words`."""
    assert process.stdout is not None
    watch = threading.Timer(WAIT_S, process.kill)
    watch.start()
    try:
        for line in process.stdout:
            if words in line:
                return line
    finally:
        watch.cancel()
    pytest.fail(f"the command ended with {process.wait()} and never said {words!r}")


def below(pid: int, title: str = "") -> list[int]:
    """Processes that `pid` has started, at any depth, with `title` in their command line."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
    found, front = set(), {pid}
    while front := {child for child, parent in parents.items() if parent in front} - found:
        found |= front
    return sorted(child for child in found if title in titles.get(child, ""))


def until(condition: Callable[[], Any], what: str) -> Any:
    """The first value of `condition` that is true."""
    end = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.1)
    return value


def post(url: str, body: Any) -> tuple[int, dict[str, Any], int]:
    """(status, JSON, tries) of one request; nothing is sent twice here."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as response:
            return response.status, json.load(response), int(response.headers["x-tries"])
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), 0


@pytest.fixture(scope="module")
def service(home: Path, lone: Any) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The service with two replicas, and its URL. `lone` comes first: its exported vision tower is used."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    process = start(home, "serve", "--replicas", 2, "--port", port)
    try:
        url = line_with(process, "answering on").split()[-1]
        yield process, url
        started = below(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 0
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), "the end of all processes")
    finally:
        process.kill()


def replicas(process: "subprocess.Popen[str]") -> list[int]:
    return below(process.pid, "ray::ServeReplica:qvl-edge:Model")


def test_a_killed_replica_costs_no_answer(service: Any, lone: Any) -> None:
    process, url = service
    asked = [(png(seed), question) for seed in range(SCENES) for question in QUESTIONS]
    bodies = [{"images": [data_uri(i)], "question": q, "options": {"temperature": 0}} for i, q in asked]
    victim, other = replicas(process)
    with ThreadPoolExecutor(len(bodies)) as pool:
        futures = [pool.submit(post, url, body) for body in bodies]
        ended = as_completed(futures, timeout=WAIT_S)
        for _ in range(3):  # so that both replicas are at work, each with as many of the others as it takes
            next(ended)
        os.kill(victim, signal.SIGKILL)
        outcomes = [future.result() for future in futures]
    assert [status for status, _, _ in outcomes] == [200] * len(bodies)
    for (image, question), (_, answer, _) in zip(asked, outcomes, strict=True):
        expected = lone(image, question)
        assert answer["token_ids"] == expected.token_ids
        assert answer["text"] == expected.text
        assert answer["boxes"] == [box.to_dict() for box in expected.boxes]
    assert {tries for _, _, tries in outcomes} == {1, 2}  # some were in flight on the victim
    until(lambda: len(set(replicas(process)) - {victim, other}) == 1, "a replica in the victim's place")


def test_nothing_but_a_data_uri_opens_an_image(service: Any, tmp_path: Path) -> None:
    url = service[1]
    (tmp_path / "secret.png").write_bytes(png(0))
    for opening in (str(tmp_path / "secret.png"), f"file://{tmp_path}/secret.png", "http://127.0.0.1/secret.png"):
        status, body, _ = post(url, {"images": [opening], "question": "What is this?"})
        assert (status, body["error"]["param"]) == (400, "images[0]")
    markup = f"<img>{tmp_path}/secret.png</img>What is this?"
    status, body, _ = post(url, {"question": markup, "options": {"max_tokens": 4}})
    assert (status, body["usage"]["images"]) == (200, 0)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"question": "?", "image": "data:"}, "image"),
        ({"images": []}, "question"),
        ({"images": [data_uri(b"not an image")], "question": "?"}, "images[0]"),
        ({"images": ["data:image/png;base64,"] * 17, "question": "?"}, "images"),
        ({"question": "?", "options": {"n": 2}}, "options.n"),
        ({"question": "?", "options": {"max_tokens": "4"}}, "options.max_tokens"),
        ({"question": "?", "options": {"seed": 1 << 63}}, "options.seed"),
    ],
)
def test_a_request_that_is_not_understood_is_refused_by_field(body: Any, param: str | None) -> None:
    with pytest.raises(Refusal) as refused:
        asyncio.run(read_question(json.dumps(body).encode()))
    assert (refused.value.status, refused.value.param) == (400, param)


def dying(deaths: int) -> tuple[Any, list[float]]:
    """A handle whose first `deaths` replicas die over what they are asked, and when it was asked."""
    asked: list[float] = []

    async def remote(*_: Any) -> tuple[int, dict[str, Any]]:
        asked.append(time.monotonic())
        if len(asked) <= deaths:
            raise ActorDiedError
        return 200, {"text": "yes"}

    return SimpleNamespace(answer=SimpleNamespace(remote=remote)), asked


def test_a_request_that_kills_replicas_ends_before_it_has_killed_all() -> None:
    access = Access("127.0.0.1", None)
    handle, asked = dying(TRIES - 1)
    response = asyncio.run(Ingress(handle, access, room=1)._answer([], {}))
    assert (response.status_code, response.headers["x-tries"]) == (200, str(TRIES))
    handle, asked = dying(TRIES)
    with pytest.raises(Refusal) as refused:
        asyncio.run(Ingress(handle, access, room=1)._answer([], {}))
    assert (refused.value.status, len(asked)) == (503, TRIES)
    assert all(later - earlier >= PAUSE_S for earlier, later in zip(asked, asked[1:], strict=False))


def rows(out: Path) -> list[dict[str, Any]]:
    return sorted(pq.read_table(out).to_pylist(), key=lambda row: row["path"])


def test_a_folder_gets_a_row_for_each_image_whatever_is_broken_or_killed(home: Path, lone: Any, tmp_path: Path) -> None:
    images, out, question = tmp_path / "images", tmp_path / "out", QUESTIONS[0]
    (images / "more").mkdir(parents=True)
    for seed in range(12):
        (images / ("more" if seed % 2 else ".") / f"{seed:02}.png").write_bytes(png(seed))
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and then nothing of a picture")
    arguments = (images, out, "--question", question, "--actors", 2)

    job = start(home, "batch", *arguments, "--batch", 1)
    line_with(job, "1 of 13 images")
    os.kill(below(job.pid, "ray::MapWorker")[0], signal.SIGKILL)
    assert line_with(job, "13 of 13 images").endswith("1 with an error\n")
    assert job.wait(WAIT_S) == 0
    broken, *answered = sorted(rows(out), key=lambda row: row["path"] != "broken.jpg")
    assert "broken.jpg" in broken["error"] and broken["text"] is broken["boxes"] is broken["tokens"] is None
    assert {row["path"] for row in answered} == {f"{'more/' * (seed % 2)}{seed:02}.png" for seed in range(12)}
    assert len(answered) == 12
    for row in answered:
        expected = lone((images / row["path"]).read_bytes(), question)
        assert (row["text"], row["tokens"], row["error"]) == (expected.text, len(expected.token_ids), None)
        assert json.loads(row["boxes"]) == [box.to_dict() for box in expected.boxes]
        assert row["seconds"] > 0

    # again: nothing is done but to take away what a killed writer left
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    (out / "part-0.parquet.partial").write_bytes(b"PAR1")
    job = start(home, "batch", *arguments)
    assert line_with(job, "images") == "13 images, 13 have a row, 0 to answer\n"
    assert job.wait(WAIT_S) == 0
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before

    # with an image more: that one
    (images / "12.png").write_bytes(png(12))
    job = start(home, "batch", *arguments)
    line_with(job, "1 of 1 images, 0 with an error")
    assert job.wait(WAIT_S) == 0
    (new,) = set(file.name for file in out.iterdir()) - before.keys()
    assert [row["path"] for row in pq.read_table(out / new).to_pylist()] == ["12.png"]
    assert len(rows(out)) == 14

    # another question has no place among these rows
    job = start(home, "batch", images, out, "--question", "What else?")
    assert job.wait(WAIT_S) == 1
    said = (home / "batch.stderr").read_text()
    assert question in said and "What else?" in said
