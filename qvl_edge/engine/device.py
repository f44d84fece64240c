"""The device a model runs on: whether it exists and whether the kernels run on it, checked before anything is read."""

import os
import platform
from dataclasses import dataclass

import torch

from qvl_edge.cards import family_of
from qvl_edge.errors import ConfigError
from qvl_edge.machine import cpu_name, nvidia_smi
from qvl_edge.memory import device_memory

CAPABILITY = (7, 5)  # least of the kernels: they are compiled and checked from sm_75 on (docs/kernels.md)
BFLOAT16 = (8, 0)  # least of bfloat16
MIN_FREE = 10**9  # bytes: with its libraries alone a process takes 0.6 GB, a CUDA context about as much


def find_device(name: str, *, option: str = "device", kernels: bool = True) -> torch.device:
    """The device "cpu", "cuda", "cuda:N" or "auto", which is CUDA where torch sees it; one of CUDA has its index.

    "cuda" is torch's current device, so that two names of one device are equal. option: what an error calls it.
    kernels: whether our kernels run on it; onnxruntime encodes images on cards that are too old for them.
    ConfigError for a device that is not known, not there, too old, or refused by its driver, as a card in exclusive
    mode is while another program computes on it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        others = ", or 'openvino'" if option == "vision_device" else ""
        raise ConfigError(f"{option} is {name!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'{others}")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"{option} is '{device}', but torch {torch.__version__} sees no CUDA device; install a torch built for "
            f"CUDA and its driver, or use {option}='cpu'"
        )
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if device.index >= (count := torch.cuda.device_count()):
        known = " or ".join(f"cuda:{index}" for index in range(count))
        raise ConfigError(f"{option} is '{device}', but torch sees {count} CUDA device{'s' * (count > 1)}; use {known}")
    _check_card(device, option, kernels)
    return device


def check_cpu() -> None:
    """ConfigError if the CPU lacks what onnxruntime's kernels for 4 bits are made for; on ARM there is always NEON."""
    if platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx2_supported():
        raise ConfigError(
            f"{cpu_name()} has no AVX2, which products with packed weights need; use a CPU that has it (2013 and "
            "later), or the float checkpoint without --head int8"
        )


def _check_card(device: torch.device, option: str, kernels: bool) -> None:
    properties = torch.cuda.get_device_properties(device)
    if kernels and (old := too_old(properties.name, (properties.major, properties.minor))) is not None:
        raise ConfigError("; ".join(old))
    try:
        device_memory(device)  # makes the context
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]  # advice on debugging kernels follows
        flag = option.replace("_", "-")
        raise ConfigError(
            f"{properties.name} cannot be used{_shared(device)}: {reason}; stop the other program, or add "
            f"--{flag} cpu (in Python {option}='cpu')"
        ) from None


def too_old(name: str, capability: tuple[int, int]) -> tuple[str, str] | None:
    """(what is wrong, what to do) with a card below CAPABILITY; None for one that the kernels run on."""
    if capability >= CAPABILITY:
        return None
    (has, has_sm), (needed, needed_sm) = ((f"{a}.{b}", f"sm_{a}{b}") for a, b in (capability, CAPABILITY))
    return (
        f"{name} is a {family_of(capability)} card of compute capability {has} ({has_sm}), the kernels need {needed} "
        f"({needed_sm})",
        "add --device cpu (in Python device='cpu'), run the checkpoint with its own code (transformers and auto-gptq), "
        f"which such a card runs, or use one of {needed} or more (GTX 16, RTX 20 and later, T4)",
    )


def check_dtype(device: torch.device, dtype: str | None) -> None:
    """ConfigError for a compute dtype that the kernels do not have on a CUDA device."""
    if device.type != "cuda":
        return
    if dtype == "float32":
        raise ConfigError("dtype is 'float32', the kernels for CUDA compute in 'float16' or 'bfloat16'; pass one")
    if dtype == "bfloat16" and is_turing(device):
        name = torch.cuda.get_device_properties(device).name
        raise ConfigError(f"dtype is 'bfloat16', which {name} (Turing) does not compute in; pass 'float16'")


def is_turing(device: torch.device) -> bool:
    """Whether it is a card of the one family that the kernels run on and that has no bfloat16."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor) < BFLOAT16


@dataclass(frozen=True)
class Program:
    """Another program that computes on a card, as nvidia-smi lists it. card: the card's uuid."""

    card: str
    pid: str
    used: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid}, {self.used})"


def programs_on_cards() -> list[Program]:
    """The programs that compute on any card, without this process."""
    rows = nvidia_smi("compute-apps", "gpu_uuid", "pid", "used_memory", "name")
    return [Program(card.removeprefix("GPU-"), *rest) for card, *rest in rows if rest[0] != str(os.getpid())]


def named_with_others(device: torch.device) -> str:
    """`device` as an error about free memory names it: with the programs that share it, if much of it is taken."""
    if device.type == "cuda":
        memory = device_memory(device)
        if memory.total - memory.free > MIN_FREE:
            return f"{device}{_shared(device)}"
    return str(device)


def _shared(device: torch.device) -> str:
    """The other programs on a card, in brackets; empty if there are none, or nvidia-smi lists none."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    others = [str(program) for program in programs_on_cards() if program.card == uuid]
    return f" (shared with {', '.join(others)})" if others else ""
