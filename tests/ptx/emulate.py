"""Run the launchers of kernels/gpu with their compiled PTX in the interpreter, on CPU tensors full of NaN."""

import ctypes
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from interpreter import Kernel
from memory import Memory
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.kernels import offline

Edit = Callable[[str], str]
_COMPILED: dict[tuple[Any, int], Any] = {}


def compiled(launch: offline.Launch, capability: int) -> Any:
    """Triton's result for one launch."""
    if (launch, capability) not in _COMPILED:
        names = launch.function.arg_names
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
        source = ASTSource(launch.function, dict(launch.signature), dict(launch.constants), aligned)
        target = GPUTarget("cuda", capability, 32)
        _COMPILED[launch, capability] = triton.compile(source, target=target, options=dict(launch.options))
    return _COMPILED[launch, capability]


def view(tensor: Tensor) -> tuple[int, np.ndarray]:
    """A tensor's storage: its address and its bytes."""
    storage = tensor.untyped_storage()
    address = storage.data_ptr()
    return address, np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(address))


@contextmanager
def emulated(capability: int, edit: Edit = lambda ptx: ptx, seed: int = 0) -> Iterator[None]:
    """Launches run `edit`ed PTX of `capability`, programs in random order; every new float tensor is NaN."""
    order = random.Random(seed)

    def run(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        assert not warmup
        values = dict(zip(self.arg_names, arguments, strict=False))
        values |= {name: value for name, value in named.items() if name in self.arg_names}
        if "ASM" in values:  # which launchers set on a card
            named["ASM"] = True
        launch = offline._launch(self, arguments, dict(named))
        code = compiled(launch, capability)
        kernel = Kernel(edit(code.asm["ptx"]), code.metadata.shared, dict(launch.options)["num_warps"])
        memory, given, seen = Memory(), [], set[int]()
        for name, kind in launch.signature:
            value = values[name]
            if kind == "constexpr":
                continue
            if isinstance(value, Tensor):
                address, storage = view(value)
                if address not in seen:
                    memory.add(address, storage, name)
                    seen.add(address)
                assert name not in launch.aligned or value.data_ptr() % 16 == 0, name
                given.append(value.data_ptr())
            else:
                given.append(int(np.float32(value).view(np.uint32)) if isinstance(value, float) else int(value))
        shape = (*grid, 1, 1)[:3]
        programs = list(range(shape[0] * shape[1] * shape[2]))
        order.shuffle(programs)
        kernel.run([*given, 0, 0], shape, memory, programs)

    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        made = empty(*size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(torch, "empty", poisoned):
        yield
