"""A server process whose machine fails it: no descriptors, a broken pipe, SIGTERM, a device that is gone."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from qvl_edge.commands import serve

from ..conftest import CHECKPOINT
from ..harness import MODEL, WAIT_S, Server, until
from .raw import ASK, connected, crowd, to_end, whole

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits and signals"),
    pytest.mark.usefixtures("runtime"),  # whose vision tower the processes find in the cache
]


@contextlib.contextmanager
def process(
    vit_cache: Path, log: Path, shell: str = "", program: tuple[str, ...] = ("-m", "qvl_edge")
) -> Iterator[tuple[subprocess.Popen, Server]]:
    """`qvl-edge serve` on the small model, behind some words of a shell; both its outputs go to `log`."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(vit_cache.parent)}
    command = [sys.executable, *program, "serve", str(CHECKPOINT), "--port", "0", "--device", "cpu"]
    command += ["--served-model-name", MODEL]
    with log.open("wb") as written:
        script = ["bash", "-c", f'{shell} exec "$@"', "bash", *command]
        started = subprocess.Popen(script, stdout=written, stderr=written, env=environment)
    try:
        until(lambda: started.poll() is not None or "serving" in log.read_text())
        found = re.search(r"page (http://127.0.0.1:\d+)", log.read_text())
        assert found is not None, log.read_text()
        server = Server(found[1], None)
        until(lambda: alive(server))
        yield started, server
    finally:
        started.kill()
        started.wait(WAIT_S)


def alive(server: Server) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{server.url}/health", timeout=1).status_code == 200
    return False


def test_with_64_descriptors_and_200_connections_it_answers(vit_cache: Path, tmp_path: Path) -> None:
    with process(vit_cache, tmp_path / "log", "ulimit -n 64;") as (started, server):
        host, port = server.url[7:].split(":")
        crowd = [socket.create_connection((host, int(port)), timeout=WAIT_S) for _ in range(200)]
        until(lambda: alive(server))
        assert server.ask("a", max_tokens=1).status_code == 200
        for one in crowd:
            one.close()
        assert server.ask("a", max_tokens=1).status_code == 200 and started.poll() is None
        assert (tmp_path / "log").stat().st_size < 100_000


def test_broken_pipes_leave_the_slots_free_and_sigterm_lets_a_stream_end_and_takes_nothing_new(
    vit_cache: Path, tmp_path: Path
) -> None:
    long = whole(ASK[:-1] + b', "stream": true, "max_tokens": 200, "ignore_eos": true}')
    with process(vit_cache, tmp_path / "log") as (started, server):
        for _ in range(3):
            with crowd(server, 8, long):
                pass
        until(lambda: server.metric("qvl_edge_requests_running") == 0)
        assert server.ask("hello", max_tokens=2).status_code == 200
        with connected(server, long) as streaming:
            assert b"200 OK" in streaming.recv(200)
            started.send_signal(signal.SIGTERM)
            said = to_end(streaming)
        assert b"data: [DONE]" in said and (b'"finish_reason":"length"' in said or b'"error"' in said)
        assert started.wait(WAIT_S) in (0, -signal.SIGTERM) and not alive(server)
        assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_log_that_nobody_reads_any_more_stops_nothing(vit_cache: Path, tmp_path: Path) -> None:
    with process(vit_cache, tmp_path / "log", "exec 2> >(sed -u /serving/q >&1);") as (started, server):
        for _ in range(5):
            assert server.ask("a", temperature=9).status_code == 400  # each writes a line
        assert server.ask("a", max_tokens=1).status_code == 200 and started.poll() is None


def test_a_server_that_can_never_answer_again_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "FAILED_S", 0.0)
    stopped, worker = SimpleNamespace(should_exit=False), SimpleNamespace(failed=False)
    watching = threading.Thread(target=serve._stop_when_failed, args=(stopped, worker))
    watching.start()
    assert not stopped.should_exit
    worker.failed = True
    watching.join(WAIT_S)
    assert stopped.should_exit


LOSING = """
import sys
from pathlib import Path
from qvl_edge.__main__ import main
from qvl_edge.commands import serve
from qvl_edge.engine.slots import Slots

lost, serve.FAILED_S = Path(sys.argv.pop(1)), 0.5


def losing(method):
    def run(*given, **options):
        if lost.exists():
            raise RuntimeError("CUDA error: hush")
        return method(*given, **options)

    return run


for name in ("_step", "_park", "prefill"):  # whatever touches the device
    setattr(Slots, name, losing(getattr(Slots, name)))
sys.exit(main(sys.argv[1:]))
"""


def test_a_device_that_is_lost_is_an_error_then_a_503_and_then_an_exit_after_which_it_is_started_again(
    vit_cache: Path, tmp_path: Path
) -> None:
    lost, log = tmp_path / "lost", tmp_path / "log"
    with process(vit_cache, log, program=("-c", LOSING, str(lost))) as (started, server), connected(server):
        lost.touch()
        assert {server.ask("hello").status_code for _ in range(3)} <= {500, 503}
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert started.wait(WAIT_S) == 1  # what systemd's on-failure and Docker's unless-stopped act on
    assert "nothing can be answered any more" in log.read_text()
