"""The device a model runs on: whether it is there, and whether the kernels run on it, asked before anything is read."""

import torch

from qvl_edge.doctor import NEEDED, programs_on_cards, too_old
from qvl_edge.errors import ConfigError
from qvl_edge.memory import device_memory


def find_device(name: str) -> torch.device:
    """The device "cpu", "cuda", "cuda:N" or "auto", which is CUDA where torch sees it.

    ConfigError for one that is not known, not there, too old for the kernels, or refused by its driver, as a card in
    exclusive mode is while another program computes on it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}, known are 'auto', 'cpu', 'cuda' and 'cuda:N'")
    if device.type == "cuda":
        _check_card(device)
    return device


def _check_card(device: torch.device) -> None:
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device is '{device}', but torch {torch.__version__} sees no CUDA device; install a torch built for CUDA "
            "and its driver, or use device='cpu'"
        )
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        there = " or ".join(f"cuda:{index}" for index in range(count))
        raise ConfigError(f"device is '{device}', but torch sees {count} CUDA device{'s' * (count > 1)}; use {there}")
    properties = torch.cuda.get_device_properties(device)
    if (old := too_old(properties.name, (properties.major, properties.minor))) is not None:
        raise ConfigError(f"{old.found[0]}; {old.fix[0]}")
    try:
        device_memory(device)  # makes the context
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]  # advice on debugging kernels follows
        raise ConfigError(
            f"{properties.name} cannot be used{_shared(device)}: {reason}; end what else computes on it, or add "
            "--device cpu (in Python device='cpu')"
        ) from None


def named_with_others(device: torch.device) -> str:
    """What a message about free memory calls `device`: with the programs that share it, if much of it is taken."""
    if device.type == "cuda":
        memory = device_memory(device)
        if memory.total - memory.free > NEEDED:
            return f"{device}{_shared(device)}"
    return str(device)


def _shared(device: torch.device) -> str:
    """The other programs that compute on a card, in brackets; empty if there are none, or nobody tells."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    others = [str(program) for program in programs_on_cards() if program.card == uuid]
    return f" (shared with {', '.join(others)})" if others else ""
