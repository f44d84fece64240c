"""The main job where POSIX's modules, names and /proc are missing, as on Windows; and narrow consoles.

No Windows stands behind this: what only its own kernel does is not tested.
"""

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parent.parent
# read by every process at its start; libraries keep what they need, as they have code of their own for Windows
WITHOUT_POSIX = """
import importlib.machinery, locale, os, pathlib, signal, socket, sys, types, warnings
locale.getencoding = lambda: "cp1252"
OURS = ("qvl_edge", "kernels", "quantize", "export")
MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty")
NAMES = (  # of os, signal and socket
    "O_NOFOLLOW O_NONBLOCK O_CLOEXEC O_DIRECTORY fork nice getuid geteuid getgid getpgid killpg setsid uname sysconf "
    "getloadavg sched_getaffinity sched_setaffinity statvfs mkfifo chown posix_fadvise pread WNOHANG register_at_fork "
    "SIGKILL SIGHUP SIGQUIT SIGUSR1 SIGUSR2 SIGCHLD SIGALRM alarm setitimer pthread_sigmask sigwait pause "
    "AF_UNIX SO_REUSEPORT MSG_NOSIGNAL MSG_DONTWAIT"
).split()

class View(types.ModuleType):
    def __init__(self, real):
        super().__init__(real.__name__)
        self.__dict__["real"] = real
    def __getattr__(self, name):
        if name in NAMES:
            raise AttributeError(f"{self.__name__} has no {name} on Windows")
        return "nt" if (self.__name__, name) == ("os", "name") else getattr(self.real, name)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in MODULES:
            frame = sys._getframe(1)
            while frame and "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            if frame.f_globals.get("__name__", "").split(".")[0] in OURS:
                raise ImportError("no such module on this system")
        if name.split(".")[0] not in OURS or not (spec := importlib.machinery.PathFinder.find_spec(name, path, target)):
            return None
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            for real in (os, signal, socket):
                if vars(module).get(real.__name__) is real:
                    setattr(module, real.__name__, View(real))
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
warnings.filterwarnings("error", category=EncodingWarning, module="(%s)" % "|".join(OURS))  # text in the code page

def hidden(method):
    real = getattr(pathlib.Path, method)
    def without(self, *arguments, **named):
        if str(self).startswith("/proc"):
            raise FileNotFoundError(2, "No such file", str(self))
        return real(self, *arguments, **named)
    setattr(pathlib.Path, method, without)
for method in ("read_text", "write_text", "open", "read_bytes"):
    hidden(method)
"""
JOB = """
import importlib, pkgutil
import qvl_edge, kernels, quantize, export
for room in (qvl_edge, quantize, export):
    for module in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
from qvl_edge import child, memory
from qvl_edge.machine import cpu_name
assert not hasattr(child.os, "nice") and child.os.name == "nt"
memory.reset_peak()
assert memory.peak_host_bytes() > 0
cpu_name()
from qvl_edge.__main__ import main
from qvl_edge.commands import demo
demo.CALIBRATION_SCENES = 2
code = main(["demo", "--scenes", "1"])
raise SystemExit(code or main(["run", "demo-output/bundle", "--image", "图 1.png", "框出红色的车"]))
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qvl_edge.demo.scenes import UNSEEN, make_scene

    found = tmp_path_factory.mktemp("systems")
    (found / "site").mkdir()
    (found / "site/sitecustomize.py").write_text(WITHOUT_POSIX)
    folder = found / "模型 of two words"
    folder.mkdir()
    make_scene(UNSEEN).image.save(folder / "图 1.png")
    return folder


def windows(folder: Path) -> dict[str, str]:
    """A process of this environment has no POSIX, and its pipes have a Western code page."""
    options = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "PYTHONWARNDEFAULTENCODING": "1"}
    search = os.pathsep.join((str(folder.parent / "site"), str(ROOT)))
    return environment(PYTHONPATH=search, XDG_CACHE_HOME=str(folder), **options)


@pytest.mark.slow
def test_every_module_loads_and_the_main_job_runs_without_posix(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", JOB], cwd=folder, env=windows(folder), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert (folder / "demo-output/bundle/vit.onnx").is_file() and b"<box>" in done.stdout


@pytest.mark.slow
def test_it_serves_without_posix(folder: Path) -> None:
    """Text, a picture of a local file, which a process of its own decodes, a schema, which one checks; and Ctrl-C."""
    bundle = folder / "demo-output/bundle"
    if not bundle.exists():
        pytest.skip("the bundle is made by the test before")
    arguments = [str(bundle), "--port", "0", "--allowed-local-media-path", str(folder), "--max-new-tokens", "8"]
    command = [sys.executable, "-m", "qvl_edge", "serve", *arguments]
    process = subprocess.Popen(command, cwd=folder, env=windows(folder), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = []
        while not (found := re.search(r"API (http://\S+)/v1", lines[-1] if lines else "")):
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        schema = {"type": "object", "properties": {"颜色": {"enum": ["红色"]}}, "required": ["颜色"]}
        picture = {"type": "image_url", "image_url": {"url": (folder / "图 1.png").as_uri()}}
        asked = [
            {"messages": [{"role": "user", "content": [picture, {"type": "text", "text": "框出红色的车"}]}]},
            {
                "messages": [{"role": "user", "content": "红色"}],
                "max_tokens": 64,
                "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
            },
        ]
        ask = partial(httpx.post, f"{found[1]}/v1/chat/completions", timeout=60)
        answers = [ask(json={"model": "bundle", **body}).json() for body in asked]
    finally:
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=30)[1]
    assert answers[0].get("usage", {}).get("prompt_tokens", 0) > 256, answers[0]
    assert json.loads(answers[1]["choices"][0]["message"]["content"]) == {"颜色": "红色"}, answers[1]
    assert "Application shutdown complete" in rest and "Traceback" not in rest


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "ascii"])
def test_a_console_without_a_character_gets_an_escape_and_no_traceback(encoding: str, tmp_path: Path) -> None:
    code = (
        "from qvl_edge.__main__ import main; raise SystemExit(main(['fit', 'Qwen/Qwen-VL-Chat-Int4', '--gpu', '12GB']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(PYTHONIOENCODING=encoding, PYTHONUTF8="0"),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-1000:]
    assert "decoder layers" in done.stdout.decode(encoding)
