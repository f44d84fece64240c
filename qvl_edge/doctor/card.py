"""The checks of an NVIDIA card and of what only CUDA needs, as in checks.py."""

import functools
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from qvl_edge.doctor import probe
from qvl_edge.doctor.probe import Failed, Skipped, enough, numbers, one_line

TRITON = (3, 6)  # the least that setup.py asks for
DRIVERS = {"12": 525, "13": 580}  # the first driver for each CUDA (NVIDIA, CUDA compatibility, minor versions)
COMPILER_FIX = "apt-get install gcc python3-dev"


def check_driver(_: Path | None) -> str:
    """NVIDIA's driver, and whether torch can use it."""
    import torch

    from qvl_edge.engine.device import nvidia_smi

    cards = nvidia_smi("gpu", "driver_version", "name")
    if torch.cuda.is_available():
        return cards[0][0] if cards else "nvidia-smi not found"
    if not cards:
        raise Skipped("no NVIDIA card: the CPU is used")
    driver, card = cards[0]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and (not hidden or hidden.startswith("-")):
        raise Skipped(f"{card} is hidden by CUDA_VISIBLE_DEVICES={hidden}")
    if torch.version.cuda is None:
        found = f"{driver}, but torch is built without CUDA: {card} is unused"
        raise Failed(found, "install torch for CUDA (pytorch.org, Get Started)")
    needed = DRIVERS.get(torch.version.cuda.partition(".")[0], max(DRIVERS.values()))
    raise Failed(f"{driver} does not run CUDA {torch.version.cuda}", f"update the driver to {needed} or newer")


def check_card_in_use(_: Path | None) -> str:
    """Other programs that compute on the card: asked before this process is one of them."""
    probe.need_cuda()
    from qvl_edge.engine.device import programs_on_cards

    programs = programs_on_cards()
    import torch

    uuid = str(torch.cuda.get_device_properties(torch.device("cuda:0")).uuid)
    if others := [program for program in programs if program.card == uuid]:
        fix = f"stop them if they are yours: kill {' '.join(other.pid for other in others)}"
        raise Failed(f"other programs compute on it: {', '.join(map(str, others))}", fix)
    return "by no other program"


def check_card(_: Path | None) -> str:
    """What the card is, and whether the kernels run on it and are tuned for it."""
    probe.need_cuda()
    import torch

    from kernels.gpu.tiles import device_key, read_table
    from qvl_edge.cards import family_of
    from qvl_edge.engine.device import too_old

    device = torch.device("cuda:0")
    name, key = torch.cuda.get_device_properties(device).name, device_key(device)
    if (old := too_old(name, key.capability)) is not None:
        raise Failed(*old)
    tuned = any(card.measured for card in read_table(key.family))
    only = ", in float16 only" if key.turing else ""
    return f"{name}, {family_of(key.capability)} ({key.family}){only}" + ("" if tuned else ", tiles not tuned for it")


def check_card_memory(_: Path | None) -> str:
    """Free memory of the card."""
    probe.need_cuda()
    import torch

    from qvl_edge.memory import device_memory

    memory = device_memory(torch.device("cuda:0"))
    return enough(memory, "close the other programs on the card (nvidia-smi lists them)")


def check_triton(_: Path | None) -> str:
    """Only CUDA needs it."""
    found = probe.version("triton")
    probe.need_cuda(f"{found or 'none'}; only CUDA needs it")
    if found is None or numbers(found) < TRITON:
        raise Failed(found or "not installed", f"pip install 'triton>={TRITON[0]}.{TRITON[1]}'")
    return found


def check_compiler(_: Path | None) -> str:
    """$CC, else gcc or clang, as Triton looks for one: its first launch on CUDA compiles a helper with Python.h."""
    probe.need_cuda("only CUDA needs it")
    named = os.environ.get("CC")
    compiler = next((name for name in (("gcc", "clang") if named is None else (named,)) if shutil.which(name)), None)
    if compiler is None and named is not None:
        raise Failed(f"CC={named} is not a program", "unset CC, or set it to a C compiler")
    if compiler is None:
        raise Failed("neither gcc nor clang is installed", COMPILER_FIX)
    # not Debian's own scheme, whose folder has no headers
    if wrong := compile_header(compiler, sysconfig.get_path("include", "posix_prefix")):
        raise Failed(wrong, COMPILER_FIX)
    return compiler


@functools.cache  # every kernel asks
def compile_header(compiler: str, folder: str) -> str | None:
    """Why Python.h of `folder` does not compile, which also needs the C library's headers; None if it does."""
    command = [compiler, "-fsyntax-only", f"-I{folder}", "-x", "c", "-"]
    try:
        run = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return one_line(f"{compiler}: {error}")
    if run.returncode == 0:
        return None
    first = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr)
    return one_line(f"{compiler}: {first}")[:200]


def check_cuda_row(_: Path | None) -> str:
    """torch and onnxruntime-gpu have to be built for one CUDA."""
    import torch

    found = probe.version("onnxruntime-gpu")
    if torch.version.cuda is None or found is None:
        raise Skipped("no CUDA packages")
    from qvl_edge.vision.cuda_versions import cuda_mismatch

    if (mismatch := cuda_mismatch(found, torch.version.cuda)) is not None:
        raise Failed(*mismatch.rsplit("; ", 1))
    return f"torch cu{torch.version.cuda.partition('.')[0]} + onnxruntime-gpu {found}"
