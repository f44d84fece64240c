"""Cards that the project is for, as their makers publish them: what an offline compilation stands in for.

One or two of each family; another card takes the tiles of the nearest, with splits that fill it (kernels/gpu/tiles.py).
"""

from dataclasses import dataclass

from kernels.gpu.tiles import DeviceKey

# bytes of shared memory that one program may use (CUDA programming guide, technical specifications per capability)
SHARED = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 120: 101_376}
# programs' shared memory and warps that one multiprocessor holds (same tables)
SHARED_A_MULTIPROCESSOR = {80: 167_936, 86: 102_400, 87: 167_936, 89: 102_400, 90: 233_472, 120: 102_400}
WARPS = {80: 64, 86: 48, 87: 48, 89: 48, 90: 64, 120: 48}
PROGRAMS = {80: 32, 86: 16, 87: 16, 89: 24, 90: 32, 120: 24}


@dataclass(frozen=True)
class Card:
    """One GPU: its compute capability as a number, multiprocessors, memory bandwidth and clock under load."""

    name: str
    capability: int
    multiprocessors: int
    gb_per_s: float
    ghz: float

    @property
    def key(self) -> DeviceKey:
        """What tiles are chosen by."""
        return DeviceKey(divmod(self.capability, 10), self.multiprocessors, SHARED[self.capability])

    def resident(self, registers: int, shared: int, num_warps: int) -> int:
        """Programs that one multiprocessor runs at once: limited by registers (in units of 8 a thread), shared memory
        (1 KiB of it is the system's for each program) and warps."""
        limits = (
            65_536 // (-(-registers // 8) * 8 * 32 * num_warps),
            SHARED_A_MULTIPROCESSOR[self.capability] // (shared + 1024),
            WARPS[self.capability] // num_warps,
            PROGRAMS[self.capability],
        )
        return min(limits)


CARDS = (
    Card("NVIDIA A100-SXM4-80GB", 80, 108, 2039, 1.41),
    Card("NVIDIA GeForce RTX 3060", 86, 28, 360, 1.78),
    Card("Orin (AGX, 64 GB)", 87, 16, 204, 1.30),
    Card("NVIDIA GeForce RTX 4060", 89, 24, 272, 2.46),
    Card("NVIDIA GeForce RTX 4070", 89, 46, 504, 2.48),
    Card("NVIDIA H200", 90, 132, 4800, 1.75),
    Card("NVIDIA GeForce RTX 5060", 120, 30, 448, 2.50),
    Card("NVIDIA GeForce RTX 5070", 120, 48, 672, 2.51),
)
