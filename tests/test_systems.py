"""The main job where POSIX's modules cannot be imported and there is no /proc, as on Windows; and narrow consoles.

No Windows stands behind this: what only its own kernel does is not tested.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# before anything else is imported; libraries keep what they need of /proc, as they have code of their own for Windows
WITHOUT_POSIX = """
import pathlib, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty"):
            frame = sys._getframe(1)
            while frame and "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            name = frame.f_globals.get("__name__", "")
            if name.split(".")[0] in ("qvl_edge", "kernels", "quantize", "export"):
                raise ImportError("no such module on this system")
sys.meta_path.insert(0, Finder())
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


def run(code: str, *, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    everything = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=everything, capture_output=True)


@pytest.mark.slow
def test_every_module_loads_and_the_main_job_runs_without_posix(tmp_path: Path) -> None:
    folder = tmp_path / "模型 of two words"
    folder.mkdir()
    done = run(
        WITHOUT_POSIX
        + """
import importlib, pkgutil
import qvl_edge, kernels, quantize, export
for room in (qvl_edge, quantize, export):
    for module in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
from qvl_edge.memory import peak_host_bytes, reset_peak
from qvl_edge.machine import cpu_name
reset_peak()
assert peak_host_bytes() > 0
cpu_name()
from qvl_edge.__main__ import main
from qvl_edge.commands import demo
demo.CALIBRATION_SCENES = 2
raise SystemExit(main(["demo", "--scenes", "1"]))
""",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert (folder / "demo-output/bundle/vit.onnx").is_file()


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "ascii"])
def test_a_console_without_a_character_gets_an_escape_and_no_traceback(encoding: str, tmp_path: Path) -> None:
    code = (
        "from qvl_edge.__main__ import main; raise SystemExit(main(['fit', 'Qwen/Qwen-VL-Chat-Int4', '--gpu', '12GB']))"
    )
    done = run(code, cwd=tmp_path, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-1000:]
    assert "decoder layers" in done.stdout.decode(encoding)
