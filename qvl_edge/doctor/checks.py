"""The checks, in the order in which they are printed. Each returns what it found, or raises Failed or Skipped.

Nothing heavy is imported before the check that is about it, so that a broken torch or onnxruntime is a finding too.
"""

import functools
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from qvl_edge.doctor import card, probe
from qvl_edge.doctor.probe import Check, Failed, Skipped, enough, numbers, one_line
from qvl_edge.errors import BundleError

PYTHON, TORCH = (3, 11), (2, 6)  # the least that setup.py asks for
TOWER = 4 * 10**9  # bytes of an exported float16 vision tower at full size, which is 3.9 GB
LABEL = "红色的车 car 1"  # a label that the shipped font has to write
REINSTALL = "pip install --force-reinstall --no-deps qvl-edge"
# relative norm error against the definition: float32 in another order of sums; float16 results and prefill weights
# activations are rounded to 255 levels
TOLERANCE = {"cpu": 1e-5, "triton": 2e-3, "int8_activations": 2e-2}
KERNEL_FIXES = {
    "cpu": "pip install --force-reinstall torch",
    "triton": "rm -rf ~/.triton/cache and run this again; if it still fails, add --device cpu and report this line",
}
# onnx.helper's y = -x, float32 of shape (1,), opset 13: whether a provider really runs (tests make the same bytes)
GRAPH = (
    b'\x08\x08:2\n\x0b\n\x01x\x12\x01y"\x03Neg\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01b\x0f\n'
    b"\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


def check_python(_: Path | None) -> str:
    """Version of Python."""
    found = platform.python_version()
    if sys.version_info[:2] < PYTHON:
        raise Failed(found, f"install Python {PYTHON[0]}.{PYTHON[1]} or newer")
    return found


def check_torch(_: Path | None) -> str:
    """Version, and which CUDA it is built for."""
    fix = f"pip install 'torch>={TORCH[0]}.{TORCH[1]}'"
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of its own is missing
        raise Failed(one_line(error), fix) from None
    found = f"{torch.__version__} ({f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU'})"
    if numbers(torch.__version__) < TORCH:
        raise Failed(found, fix)
    return found


def check_host_memory(_: Path | None) -> str:
    """Free memory of the host."""
    from qvl_edge.memory import host_memory

    return enough(host_memory(), "close other programs")


def check_onnxruntime(_: Path | None) -> str:
    """One of its two packages, with the provider that this machine needs, and a graph that runs on it."""
    kind = "cuda" if probe.cuda() else "cpu"
    packages = [name for name in ("onnxruntime", "onnxruntime-gpu") if probe.version(name)]
    fix = f"pip uninstall -y onnxruntime onnxruntime-gpu; pip install 'qvl-edge[{kind}]'"
    if len(packages) == 2:
        both = " + ".join(f"{package} {probe.version(package)}" for package in packages)
        raise Failed(f"{both}: one overwrites the other", fix)
    try:
        import onnxruntime as ort
    except (ImportError, OSError) as error:
        raise Failed(one_line(error), fix) from None
    providers = [name.removesuffix("ExecutionProvider") for name in ort.get_available_providers()]
    found, needed = f"{ort.__version__} ({', '.join(providers)})", kind.upper()
    if needed not in providers:
        raise Failed(f"{found} has no {needed}", fix)
    if (reason := run_graph(ort, f"{needed}ExecutionProvider")) is not None:
        raise Failed(f"{found}: {needed} does not start: {reason}", fix)
    return f"{found}, runs on {needed}"


def run_graph(ort: Any, provider: str) -> str | None:
    """Why a graph does not run on this provider; None if it does."""
    import numpy as np

    from kernels.sessions import session_options

    options = session_options()
    options.log_severity_level = 4  # the finding says what goes wrong
    try:
        session = ort.InferenceSession(GRAPH, options, providers=[provider])
        if provider not in session.get_providers():  # onnxruntime then takes the CPU with no more than a warning
            return "its libraries were not found"
        (y,) = session.run(["y"], {"x": np.ones(1, np.float32)})
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        return one_line(error)[:200]
    return None if float(y[0]) == -1.0 else f"-1 comes out as {float(y[0])}"


def check_onnx(path: Path | None) -> str:
    """The vision tower of a checkpoint that is not a bundle is exported, which needs this package."""
    fix = "pip install 'qvl-edge[export]'"
    if importlib.util.find_spec("onnx") is not None:
        return probe.version("onnx") or "its version is unknown"
    from qvl_edge.bundle import is_bundle

    if path is None:
        raise Skipped(f"not installed; a bundle needs none, any other checkpoint does: {fix}")
    if is_bundle(path):
        raise Skipped("not installed; a bundle needs none")
    raise Failed("not installed, and the vision tower of a checkpoint has to be exported", fix)


def check_kernels_package(_: Path | None) -> str:
    """A package on PyPI has the name of our folder `kernels`, and overwrites it."""
    import qvl_edge

    spec = importlib.util.find_spec("kernels")
    found = Path(spec.origin).parent if spec is not None and spec.origin else None
    foreign = probe.version("kernels")
    if foreign is None and found == Path(qvl_edge.__file__).parent.with_name("kernels"):
        return "qvl_edge's own"
    what = f"kernels {foreign}" if foreign else str(found)
    raise Failed(f"{what} is another package of that name", f"pip uninstall -y kernels; {REINSTALL}")


def check_font(_: Path | None) -> str:
    """The font of labels in pictures."""
    from qvl_edge.text.font import SHIPPED, missing_glyphs

    if not SHIPPED.is_file():
        raise Failed(f"{SHIPPED} is missing", REINSTALL)
    if missing := missing_glyphs(SHIPPED, LABEL):
        raise Failed(f"{SHIPPED.name} has no {''.join(sorted(missing))}", REINSTALL)
    return SHIPPED.name


def check_cache(path: Path | None) -> str:
    """Where vision towers of checkpoints are exported to."""
    from qvl_edge.bundle import is_bundle
    from qvl_edge.files import cache_home
    from qvl_edge.memory import format_bytes

    home = cache_home()
    fix = "set XDG_CACHE_HOME to a writable folder with enough space"
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        raise Failed(f"{existing} cannot be written to", fix)
    free = shutil.disk_usage(existing).free
    found = f"{home}, {format_bytes(free)} free"
    if free < TOWER and not (path and is_bundle(path)):
        raise Failed(f"{found}, a vision tower takes {format_bytes(TOWER)}", fix)
    return found


def check_kernel(name: str, _: Path | None) -> str:
    """A kernel against its definition: Triton's on CUDA, the CPU's elsewhere."""
    device, backend = ("cuda", "triton") if probe.cuda() else ("cpu", "cpu")
    if device == "cuda":
        try:
            card.check_compiler(None)
        except Failed:
            raise Skipped("needs a C compiler") from None
    from qvl_edge.doctor import self_tests

    if backend == "cpu" and name not in self_tests.ON_CPU:
        raise Skipped("plain PyTorch on a CPU")
    if backend == "triton" and name in self_tests.CPU_ALONE:
        raise Skipped("of a CPU's products")
    allowed = TOLERANCE.get(name, TOLERANCE[backend])
    try:
        error = self_tests.KERNELS[name](device, backend)
    except ImportError:  # a finding of another check
        raise
    except Exception as raised:
        raise Failed(one_line(f"{type(raised).__name__}: {raised}")[:300], KERNEL_FIXES[backend]) from None
    found = f"{backend}, error {error:.1e}"
    if not error <= allowed:
        raise Failed(f"{found}, allowed {allowed:.0e}", KERNEL_FIXES[backend])
    return found


def check_model(path: Path | None) -> str:
    """A bundle's manifest and hashes; of a checkpoint, that every tensor is there."""
    if path is None:
        raise Skipped("none given")
    from qvl_edge.bundle import Bundle, is_bundle
    from qvl_edge.checkpoint import Checkpoint
    from qvl_edge.memory import format_bytes
    from qvl_edge.model.loading import check_tensors

    if not is_bundle(path):
        checkpoint = Checkpoint(path)
        check_tensors(checkpoint)
        return f"a checkpoint, its {len(checkpoint.names)} tensors match config.json; it has no hashes"
    files = [entry for part in Bundle.open(path, verify=True).parts.values() for entry in part["files"].values()]
    return f"{len(files)} files, {format_bytes(sum(entry['bytes'] for entry in files))}, hashes match"


def check_vision(path: Path | None) -> str:
    """A bundle's vision tower against the features that were written at its export."""
    from qvl_edge.bundle import Bundle, is_bundle

    if path is None or not is_bundle(path):
        raise Skipped("no bundle given")
    try:
        bundle = Bundle.open(path)
    except BundleError:  # a finding of check_model
        raise Skipped("needs an intact bundle") from None
    from qvl_edge.vision.encoder import VisionEncoder, self_test

    encoder = VisionEncoder(bundle.vit, bundle.config.visual, device="cuda" if probe.cuda() else "cpu")
    return f"cosine {self_test(encoder, bundle.parts['vit']):.6f} with its export"


KERNELS = (
    "int4_gemm",
    "swiglu",
    "residual",
    "rotary_attention",
    "int8_gemm",
    "int8_activations",
)  # those of self_tests, which needs torch
CHECKS: dict[str, Check] = {
    "python": check_python,
    "torch": check_torch,
    "driver": card.check_driver,
    "card in use": card.check_card_in_use,
    "card": card.check_card,
    "card memory": card.check_card_memory,
    "triton": card.check_triton,
    "C compiler": card.check_compiler,
    "onnxruntime": check_onnxruntime,
    "onnx": check_onnx,
    "cuda row": card.check_cuda_row,
    "kernels": check_kernels_package,
    "font": check_font,
    "cache folder": check_cache,
    "host memory": check_host_memory,
    **{name: functools.partial(check_kernel, name) for name in KERNELS},
    "bundle": check_model,
    "vision tower": check_vision,
}
