"""The wheel holds all of the four rooms and nothing else, and runs outside the source tree."""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "qvl_edge", "quantize", "export")
ELSEWHERE = ("onnxruntime-gpu", "triton-windows")  # not on this machine
BUILT_FROM = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, as building leaves files behind; the wheel and the sdist are in its `dist`."""
    folder = tmp_path_factory.mktemp("tree")
    for room in (*ROOMS, "tests", "benchmarks", "examples"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, folder)
    build = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, capture_output=True)
    return folder


def files_of_rooms(tree: Path) -> set[str]:
    return {str(file.relative_to(tree)) for room in ROOMS for file in (tree / room).rglob("*") if file.is_file()}


def test_the_wheel_holds_every_file_of_the_rooms_and_nothing_else(tree: Path) -> None:
    (wheel,) = (tree / "dist").glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == files_of_rooms(tree)
    assert {name.partition("/")[0] for name in names} == set(ROOMS)
    assert "qvl_edge/py.typed" in names and any(name.endswith("sm_86.json") for name in names)


def test_the_wheels_metadata_has_licence_classifiers_and_extras(tree: Path) -> None:
    (wheel,) = (tree / "dist").glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    said = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    assert said["License-Expression"] == "Apache-2.0 AND OFL-1.1"
    assert len(said.get_all("License-File")) == 2
    assert {f"{info}/licenses/{name}" for name in said.get_all("License-File")} <= set(archive.namelist())
    assert "Topic :: Scientific/Engineering :: Image Recognition" in said.get_all("Classifier")
    assert said.get_all("Project-URL") and (ROOT / "CHANGELOG.md").read_text().count(f"## {said['Version']} ") == 1
    needed = said.get_all("Requires-Dist")
    assert 'onnxruntime<2,>=1.23; extra == "cpu"' in needed
    assert not [one for one in needed if one.startswith("onnx") and "extra" not in one]


def test_the_sdist_holds_what_the_wheel_is_built_from(tree: Path) -> None:
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {name for name in names if name.startswith("qvl_edge.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - made == files_of_rooms(tree) | set(BUILT_FROM)


def test_dependencies_are_bounded_above_what_was_tested(tree: Path) -> None:
    (wheel,) = (tree / "dist").glob("*.whl")
    (name,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("METADATA"))
    asked = Parser().parsestr(zipfile.ZipFile(wheel).read(name).decode()).get_all("Requires-Dist", [])
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    tested = {pin.name: next(iter(pin.specifier)).version for pin in pins}
    for needed in map(Requirement, asked):
        if "interop" in str(needed.marker) or (needed.name not in tested and "dev" in str(needed.marker)):
            continue
        bounds = {each.operator for each in needed.specifier}
        assert needed.specifier.contains(tested.get(needed.name, "")) or needed.name in ELSEWHERE, needed
        assert bounds & {"<", "=="} or needed.name == "regex" or "dev" in str(needed.marker), needed


@pytest.fixture(scope="module")
def installed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, which finds the packages that it needs in this one."""
    folder = tmp_path_factory.mktemp("user") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (wheel,) = (tree / "dist").glob("*.whl")
    install = ["-m", "pip", "--python", folder, "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run([sys.executable, *install], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # packages only: an editable install of the tree hangs on .pth files, which are not read in a folder that one names
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(installed: Path, *command: str) -> str:
    """The output of a program of the environment, run beside it without this process's paths."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["XDG_CACHE_HOME"] = str(installed.parent / "cache")
    program = [str(installed / "bin" / command[0]), *command[1:]]
    done = subprocess.run(program, cwd=installed.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_room_comes_from_the_wheel(installed: Path) -> None:
    code = f"import {', '.join(ROOMS)}\nfor room in ({', '.join(ROOMS)}): print(room.__file__)"
    files = run(installed, "python", "-c", code).split()
    assert len(files) == len(ROOMS) and all(Path(file).is_relative_to(installed) for file in files)


def test_folders_and_modules_of_the_current_folder_are_not_imported(installed: Path) -> None:
    for name in ("export/__init__.py", "quantize/__init__.py", "kernels/__init__.py", "torch.py", "sitecustomize.py"):
        file = installed.parent / "trap" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("raise SystemExit('run from the current folder')", encoding="utf-8")
    command = [installed / "bin/qvl-edge", "fit", ROOT / "qvl_edge/demo/checkpoint", "--gpu", "12GB"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=installed.parent / "trap", env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "12" in done.stdout, done.stdout + done.stderr


def test_the_demo_runs_outside_the_tree(installed: Path) -> None:
    assert "--scenes" in run(installed, "qvl-edge", "demo", "--help")
    code = """
from qvl_edge.__main__ import main
from qvl_edge.commands import demo
demo.CALIBRATION_SCENES = 4  # of 48, which take half a minute
raise SystemExit(main(["demo", "--scenes", "1"]))
"""
    output = run(installed, "python", "-c", code)
    assert "answers are exact" in output and str(installed) in output  # the checkpoint of the wheel
    assert (installed.parent / "demo-output/bundle/vit.onnx").is_file()
    sheet = (installed.parent / "demo-output/index.html").read_text(encoding="utf-8")
    assert 'src="scene-1.png"' in sheet and "<dt>" in sheet and "vision tower" in sheet and "index.html" in output
