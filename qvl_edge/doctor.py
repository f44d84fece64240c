"""What this machine has, and whether all of it works: one finding a check, and for each failure one line that mends it.

Nothing heavy is imported before the check that is about it, so that a broken torch or onnxruntime is a finding too.
"""

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from qvl_edge.errors import QvlError

Said: TypeAlias = str | tuple[str, str]
"""Words in no language, such as versions and commands, or (English, Chinese)."""
Status = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """What a check has found. `fix` is the one line that mends a failure; other findings have none."""

    name: str
    status: Status
    found: Said
    fix: Said = ""

    def in_language(self, language: str) -> "Finding":
        """With `found` and `fix` as plain strings; language "en" or "zh"."""
        index = ("en", "zh").index(language)
        found, fix = (said if isinstance(said, str) else said[index] for said in (self.found, self.fix))
        return Finding(self.name, self.status, found, fix)


Check: TypeAlias = Callable[[Path | None], Iterator[Finding]]

PYTHON, TORCH, TRITON = (3, 11), (2, 6), (3, 6)  # the least that setup.py asks for
CAPABILITY = (8, 0)  # of the kernels: what they are compiled and checked for begins at sm_80 (docs/kernels.md)
DRIVERS = {"12": 525, "13": 580}  # the first driver for each CUDA (NVIDIA, CUDA compatibility, minor versions)
LAST_ORT_CUDA_12 = (1, 26)
NEEDED = 10**9  # bytes free: with the libraries alone a process takes 0.6 GB, a CUDA context about as much
TOWER = 4 * 10**9  # bytes of an exported float16 vision tower at full size, which is 3.9 GB
LABEL = "红色的车 car 1"  # a label that the shipped font has to write
REINSTALL = "pip install --force-reinstall --no-deps qvl-edge"
# onnx.helper's y = -x, float32 of shape (1,), opset 13: whether a provider really runs (tests make the same bytes)
GRAPH = (
    b'\x08\x08:2\n\x0b\n\x01x\x12\x01y"\x03Neg\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01b\x0f\n'
    b"\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
# relative norm error against the definition: float32 in another order of sums; float16 results and prefill weights
TOLERANCE = {"cpu": 1e-5, "triton": 2e-3}


def examine(path: Path | None = None) -> Iterator[Finding]:
    """Every finding, each as soon as it is there; with `path`, a bundle or a checkpoint, also about that."""
    for name, check in CHECKS.items():
        yield from _guarded(name, check, path)


def _guarded(name: str, check: Check, path: Path | None) -> Iterator[Finding]:
    """A check that raises is a finding like any other."""
    try:
        yield from check(path)
    except QvlError as error:
        yield Finding(name, "failed", *split_error(error))
    except Exception as error:
        # what is missing has a check of its own
        missing = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
        if sys.modules.get("torch") is None:
            missing = "torch"  # it may also break with an OSError
        if missing in ("torch", "onnxruntime", "kernels"):
            yield Finding(name, "skipped", (f"needs {missing}", f"需要 {missing}"))
        elif missing:
            yield Finding(name, "failed", _one_line(str(error)), "pip install qvl-edge")
        else:
            said = _one_line(f"{type(error).__name__}: {error}")
            yield Finding(name, "failed", said, ("report this line", "请反馈此行"))


def split_error(error: QvlError) -> tuple[str, str]:
    """What is wrong, and the next step, which stands at the end of our messages."""
    message = _one_line(str(error))
    wrong, _, fix = message.rpartition("; ")
    if not wrong:
        wrong, _, fix = message.partition(". ")
    return (wrong, fix) if wrong and fix else (message, "see README.md")


def _one_line(message: str) -> str:
    return " ".join(message.split())


def check_python(_: Path | None) -> Iterator[Finding]:
    """Version of Python."""
    found, wanted = platform.python_version(), ".".join(map(str, PYTHON))
    if sys.version_info[:2] >= PYTHON:
        yield Finding("python", "ok", found)
    else:
        yield Finding(
            "python", "failed", found, (f"install Python {wanted} or newer", f"安装 Python {wanted} 或更新版本")
        )


def check_torch(_: Path | None) -> Iterator[Finding]:
    """Version, and which CUDA it is built for."""
    fix = f"pip install 'torch>={TORCH[0]}.{TORCH[1]}'"
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of its own is missing
        yield Finding("torch", "failed", _one_line(str(error)), fix)
        return
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    status: Status = "ok" if _numbers(torch.__version__) >= TORCH else "failed"
    yield Finding("torch", status, f"{torch.__version__} ({built})", "" if status == "ok" else fix)


def check_triton(_: Path | None) -> Iterator[Finding]:
    """Only CUDA needs it."""
    found, fix = _version("triton"), f"pip install 'triton>={TRITON[0]}.{TRITON[1]}'"
    if not _cuda():
        yield Finding("triton", "skipped", (f"{found or 'none'}; only CUDA needs it", f"{found or '无'}；仅 CUDA 需要"))
    elif found is None:
        yield Finding("triton", "failed", ("not installed", "未安装"), fix)
    else:
        status: Status = "ok" if _numbers(found) >= TRITON else "failed"
        yield Finding("triton", status, found, "" if status == "ok" else fix)


def check_compiler(_: Path | None) -> Iterator[Finding]:
    """$CC, else gcc or clang, as Triton looks for one: its first launch on CUDA compiles a helper with Python.h."""
    if not _cuda():
        yield Finding("C compiler", "skipped", ("only CUDA needs it", "仅 CUDA 需要"))
        return
    named = os.environ.get("CC")
    compiler = next((name for name in (("gcc", "clang") if named is None else (named,)) if shutil.which(name)), None)
    fix = "apt-get install gcc python3-dev"
    if compiler is not None:
        wrong = _compile_header(compiler)
        yield Finding("C compiler", "failed", wrong, fix) if wrong else Finding("C compiler", "ok", compiler)
    elif named is None:
        yield Finding("C compiler", "failed", ("neither gcc nor clang is there", "没有 gcc，也没有 clang"), fix)
    else:
        said = (f"CC={named} is no program", f"CC={named} 不是程序")
        yield Finding(
            "C compiler", "failed", said, ("unset CC, or name a C compiler in it", "取消 CC，或设为 C 编译器")
        )


def _compile_header(compiler: str) -> str | None:
    """Why Python.h does not compile, which also needs the C library's headers; None if it does."""
    folder = sysconfig.get_path("include", "posix_prefix")  # not Debian's own scheme, whose folder has no headers
    command = [compiler, "-fsyntax-only", f"-I{folder}", "-x", "c", "-"]
    try:
        run = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return _one_line(f"{compiler}: {error}")
    if run.returncode == 0:
        return None
    said = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr)
    return _one_line(f"{compiler}: {said}")[:200]


def check_onnxruntime(_: Path | None) -> Iterator[Finding]:
    """One of its two packages, with the provider that is wanted, and a graph that runs on it."""
    kind = "cuda" if _cuda() else "cpu"
    packages = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    fix = f"pip uninstall -y onnxruntime onnxruntime-gpu; pip install 'qvl-edge[{kind}]'"
    if len(packages) == 2:
        both = f"onnxruntime {_version(packages[0])} + onnxruntime-gpu {_version(packages[1])}"
        yield Finding("onnxruntime", "failed", (f"{both}: one overwrites the other", f"{both}：互相覆盖"), fix)
        return
    try:
        import onnxruntime as ort
    except (ImportError, OSError) as error:
        yield Finding("onnxruntime", "failed", _one_line(str(error)), fix)
        return
    providers = [name.removesuffix("ExecutionProvider") for name in ort.get_available_providers()]
    found = f"{ort.__version__} ({', '.join(providers)})"
    wanted = kind.upper()
    if wanted not in providers:
        yield Finding("onnxruntime", "failed", (f"{found} has no {wanted}", f"{found} 缺少 {wanted}"), fix)
    elif (reason := _run_graph(ort, f"{wanted}ExecutionProvider")) is not None:
        said = (f"{found}: {wanted} does not start: {reason}", f"{found}：{wanted} 无法启动：{reason}")
        yield Finding("onnxruntime", "failed", said, fix)
    else:
        yield Finding("onnxruntime", "ok", (f"{found}, runs on {wanted}", f"{found}，可在 {wanted} 上运行"))


def _run_graph(ort: Any, provider: str) -> str | None:
    """Why a graph does not run on this provider; None if it does."""
    import numpy as np

    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is said here
    try:
        session = ort.InferenceSession(GRAPH, options, providers=[provider])
        if provider not in session.get_providers():  # onnxruntime then takes the CPU with no more than a warning
            return "its libraries were not found"
        (y,) = session.run(["y"], {"x": np.ones(1, np.float32)})
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        return _one_line(str(error))[:200]
    return None if float(y[0]) == -1.0 else f"-1 comes out as {float(y[0])}"


def check_cuda_row(_: Path | None) -> Iterator[Finding]:
    """torch and onnxruntime-gpu have to be built for one CUDA."""
    import torch

    found = _version("onnxruntime-gpu")
    if torch.version.cuda is None or found is None:
        yield Finding("cuda row", "skipped", ("no CUDA packages", "未安装 CUDA 版本的包"))
        return
    from qvl_edge.vision.cuda_versions import cuda_mismatch

    row = f"torch cu{torch.version.cuda.partition('.')[0]} + onnxruntime-gpu {found}"
    if (mismatch := cuda_mismatch(found, torch.version.cuda)) is None:
        yield Finding("cuda row", "ok", row)
        return
    major, minor = LAST_ORT_CUDA_12
    wanted = f"{'<' if torch.version.cuda.startswith('12') else '>='}{major}.{minor + 1}"
    yield Finding("cuda row", "failed", f"{row}: {_one_line(mismatch)}", f"pip install 'onnxruntime-gpu{wanted}'")


def check_kernels_package(_: Path | None) -> Iterator[Finding]:
    """A package on PyPI has the name of our folder `kernels`, and writes over it."""
    import qvl_edge

    ours = Path(qvl_edge.__file__).parent.with_name("kernels")
    spec = importlib.util.find_spec("kernels")
    found = Path(spec.origin).parent if spec is not None and spec.origin else None
    foreign = _version("kernels")
    if foreign is None and found == ours:
        yield Finding("kernels", "ok", ("qvl_edge's own", "qvl_edge 自带"))
        return
    what = f"kernels {foreign}" if foreign else str(found)
    said = (f"{what} is another package of that name", f"{what} 是另一个同名的包")
    yield Finding("kernels", "failed", said, f"pip uninstall -y kernels; {REINSTALL}")


def check_font(_: Path | None) -> Iterator[Finding]:
    """The font of labels in pictures."""
    from qvl_edge.text.font import SHIPPED, missing_glyphs

    if not SHIPPED.is_file():
        yield Finding("font", "failed", (f"{SHIPPED} is missing", f"缺少 {SHIPPED}"), REINSTALL)
    elif missing := missing_glyphs(SHIPPED, LABEL):
        lacks = "".join(sorted(missing))
        said = (f"{SHIPPED.name} has no {lacks}", f"{SHIPPED.name} 缺少字形 {lacks}")
        yield Finding("font", "failed", said, REINSTALL)
    else:
        yield Finding("font", "ok", SHIPPED.name)


def check_cache(path: Path | None) -> Iterator[Finding]:
    """Where vision towers of checkpoints are exported to."""
    from qvl_edge.bundle import is_bundle
    from qvl_edge.files import cache_home

    home = cache_home()
    there = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    fix: Said = (
        "set XDG_CACHE_HOME to a folder with room that you may write to",
        "将 XDG_CACHE_HOME 设为空间足够且可写的目录",
    )
    if not os.access(there, os.W_OK):
        yield Finding("cache folder", "failed", (f"{there} cannot be written to", f"{there} 不可写"), fix)
        return
    said = (f"{home}, {_gb(free)} free", f"{home}，剩余 {_gb(free)}")
    if free < TOWER and not (path and is_bundle(path)):
        said = (f"{said[0]}, a vision tower takes {_gb(TOWER)}", f"{said[1]}，视觉塔需要 {_gb(TOWER)}")
        yield Finding("cache folder", "failed", said, fix)
    else:
        yield Finding("cache folder", "ok", said)


def check_host_memory(_: Path | None) -> Iterator[Finding]:
    """Free memory of the host."""
    from qvl_edge.memory import host_memory

    memory = host_memory()
    fix: Said = ("close other programs", "关闭其他程序")
    yield _memory_finding("host memory", memory.free, memory.total, fix)


def _memory_finding(name: str, free: int, total: int, fix: Said) -> Finding:
    said = (f"{_gb(free)} of {_gb(total)} free", f"{_gb(total)} 中剩余 {_gb(free)}")
    return Finding(name, "ok", said) if free >= NEEDED else Finding(name, "failed", said, fix)


def check_driver(_: Path | None) -> Iterator[Finding]:
    """NVIDIA's driver, and whether torch can use it."""
    import torch

    cards = nvidia_smi("gpu", "driver_version", "name")
    if torch.cuda.is_available():
        yield Finding("driver", "ok", cards[0][0] if cards else ("no nvidia-smi here", "没有 nvidia-smi"))
        return
    if not cards:
        yield Finding("driver", "skipped", ("no NVIDIA card: the CPU is used", "没有 NVIDIA 显卡：使用 CPU"))
        return
    driver, card = cards[0]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and (not hidden or hidden.startswith("-")):
        said = (f"{card} is hidden by CUDA_VISIBLE_DEVICES={hidden}", f"{card} 被 CUDA_VISIBLE_DEVICES={hidden} 隐藏")
        yield Finding("driver", "skipped", said)
    elif torch.version.cuda is None:
        said = (
            f"{driver}, but torch is built without CUDA: {card} lies idle",
            f"{driver}，但 torch 不含 CUDA：{card} 闲置",
        )
        fix = ("install torch for CUDA (pytorch.org, Get Started)", "安装 CUDA 版 torch（pytorch.org，Get Started）")
        yield Finding("driver", "failed", said, fix)
    else:
        needed = DRIVERS.get(torch.version.cuda.partition(".")[0], max(DRIVERS.values()))
        said = (f"{driver} does not run CUDA {torch.version.cuda}", f"{driver} 无法运行 CUDA {torch.version.cuda}")
        yield Finding(
            "driver", "failed", said, (f"update the driver to {needed} or newer", f"将驱动更新到 {needed} 或更新版本")
        )


def check_card(_: Path | None) -> Iterator[Finding]:
    """What the card is, who else uses it, and its free memory."""
    if not _cuda():
        yield Finding("card", "skipped", ("no CUDA device", "没有 CUDA 设备"))
        return
    import torch

    from kernels.tiles import device_key, read_table
    from qvl_edge.memory import device_memory

    programs = programs_on_cards()  # before this process is one of them
    device = torch.device("cuda:0")
    properties, key = torch.cuda.get_device_properties(device), device_key(device)
    others = [program for program in programs if program.card == str(properties.uuid)]
    if (old := too_old(properties.name, key.capability)) is not None:
        yield old
    else:
        said = (f"{properties.name}, {key.family}", f"{properties.name}，{key.family}")
        if not any(card.measured for card in read_table(key.family)):
            said = (f"{said[0]}, tiles not tuned for it", f"{said[1]}，分块未针对其调优")
        yield Finding("card", "ok", said)
    if others:
        listed, pids = ", ".join(map(str, others)), " ".join(other.pid for other in others)
        said = (f"others compute on it: {listed}", f"其他程序正在使用：{listed}")
        fix = (f"end them if they are yours: kill {pids}", f"如属于您，可结束它们：kill {pids}")
        yield Finding("card in use", "failed", said, fix)
    else:
        yield Finding("card in use", "ok", ("by no other program", "没有其他程序"))
    memory = device_memory(device)
    fix = ("close what else uses the card (nvidia-smi lists it)", "关闭占用显卡的其他程序（见 nvidia-smi）")
    yield _memory_finding("card memory", memory.free, memory.total, fix)


def too_old(name: str, capability: tuple[int, int]) -> Finding | None:
    """The finding about a card of less than CAPABILITY; None for one that the kernels run on."""
    if capability >= CAPABILITY:
        return None
    (is_now, is_sm), (least, least_sm) = (
        (f"{major}.{minor}", f"sm_{major}{minor}") for major, minor in (capability, CAPABILITY)
    )
    said = (
        f"{name} has compute capability {is_now} ({is_sm}), the kernels need {least} ({least_sm})",
        f"{name} 的计算能力为 {is_now}（{is_sm}），内核需要 {least}（{least_sm}）",
    )
    fix = (
        f"add --device cpu (in Python device='cpu'), or use a card of {least} or more (RTX 30 and later)",
        f"加上 --device cpu（Python 中为 device='cpu'），或换用计算能力 {least} 以上的显卡（RTX 30 系列起）",
    )
    return Finding("card", "failed", said, fix)


def check_kernels(_: Path | None) -> Iterator[Finding]:
    """Every kernel against its definition: Triton's on CUDA, the CPU's elsewhere."""
    if any(finding.status == "failed" for finding in check_compiler(None)):
        yield Finding("self-tests", "skipped", ("needs a C compiler", "需要 C 编译器"))
        return
    yield from kernel_findings(*(("cuda", "triton") if _cuda() else ("cpu", "cpu")))


def kernel_findings(device: str, backend: str) -> Iterator[Finding]:
    """One finding a kernel."""
    from qvl_edge.engine import self_tests

    fixes: dict[str, Said] = {
        "cpu": "pip install --force-reinstall torch",
        "triton": (
            "rm -rf ~/.triton/cache and run this again; if it stays, add --device cpu and report this line",
            "rm -rf ~/.triton/cache 后重试；若仍失败，请加 --device cpu 并反馈此行",
        ),
    }
    for name, test in self_tests.KERNELS.items():
        if backend == "cpu" and name not in self_tests.ON_CPU:
            said = ("runs as its definition on a CPU", "在 CPU 上按定义运行")
            yield Finding(name, "skipped", said)
            continue
        try:
            error = test(device, backend)
        except Exception as raised:  # one kernel that does not compile should not hide the others
            yield Finding(name, "failed", _one_line(f"{type(raised).__name__}: {raised}")[:300], fixes[backend])
            continue
        found, allowed = f"{error:.1e}", f"{TOLERANCE[backend]:.0e}"
        if error <= TOLERANCE[backend]:
            yield Finding(name, "ok", (f"{backend}, error {found}", f"{backend}，误差 {found}"))
        else:
            said = (f"{backend}, error {found}, allowed {allowed}", f"{backend}，误差 {found}，允许 {allowed}")
            yield Finding(name, "failed", said, fixes[backend])


def check_model(path: Path | None) -> Iterator[Finding]:
    """A bundle's manifest, hashes and vision tower; of a checkpoint, that every tensor is there."""
    if path is None:
        return
    from qvl_edge.bundle import Bundle, is_bundle
    from qvl_edge.checkpoint import Checkpoint
    from qvl_edge.model.loading import check_tensors

    if not is_bundle(path):
        checkpoint = Checkpoint(path)
        check_tensors(checkpoint)
        said = (
            f"{len(checkpoint.names)} tensors, as config.json asks; a checkpoint has no hashes",
            f"{len(checkpoint.names)} 个张量与 config.json 一致；检查点没有哈希",
        )
        yield Finding("checkpoint", "ok", said)
        return
    bundle = Bundle.open(path, verify=True)
    files = [entry for part in bundle.parts.values() for entry in part["files"].values()]
    size = _gb(sum(entry["bytes"] for entry in files))
    yield Finding(
        "bundle", "ok", (f"{len(files)} files, {size}, hashes agree", f"{len(files)} 个文件，{size}，哈希一致")
    )

    def check_vision(_: Path | None) -> Iterator[Finding]:
        from qvl_edge.vision.encoder import VisionEncoder, self_test

        encoder = VisionEncoder(bundle.vit, bundle.config.visual, device="cuda" if _cuda() else "cpu")
        cosine = self_test(encoder, bundle.parts["vit"])
        said = (f"cosine {cosine:.6f} with its export", f"与导出时的余弦 {cosine:.6f}")
        yield Finding("vision tower", "ok", said)

    yield from _guarded("vision tower", check_vision, path)


CHECKS: dict[str, Check] = {
    "python": check_python,
    "torch": check_torch,
    "driver": check_driver,
    "card": check_card,
    "triton": check_triton,
    "C compiler": check_compiler,
    "onnxruntime": check_onnxruntime,
    "cuda row": check_cuda_row,
    "kernels": check_kernels_package,
    "font": check_font,
    "cache folder": check_cache,
    "host memory": check_host_memory,
    "self-tests": check_kernels,
    "bundle": check_model,
}


def nvidia_smi(what: str, *names: str) -> list[list[str]]:
    """Rows of `nvidia-smi --query-WHAT=names`; none where it is not there or fails."""
    command = ["nvidia-smi", f"--query-{what}={','.join(names)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    last = len(names) - 1  # a name may hold commas; it is asked for last
    return [[cell.strip() for cell in line.split(",", last)] for line in said.splitlines() if line.strip()]


@dataclass(frozen=True)
class Program:
    """Another program that computes on a card: what nvidia-smi says of it, and the uuid of the card."""

    card: str
    pid: str
    used: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid}, {self.used})"


def programs_on_cards() -> list[Program]:
    """Those that compute on any card, without this process."""
    rows = nvidia_smi("compute-apps", "gpu_uuid", "pid", "used_memory", "name")
    return [Program(card.removeprefix("GPU-"), *rest) for card, *rest in rows if rest[0] != str(os.getpid())]


def _cuda() -> bool:
    """Whether torch sees a CUDA device; False where there is no torch, which has a check of its own."""
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError):
        return False
    return bool(torch.cuda.is_available())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"
