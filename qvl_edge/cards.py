"""NVIDIA's consumer cards as they are sold: what `fit --gpu "RTX 3060"` stands for, and the names of families."""

FAMILIES = {5: "Maxwell", 6: "Pascal", 7: "Volta", 8: "Ampere", 9: "Hopper", 10: "Blackwell", 12: "Blackwell"}
# GiB, and compute capability; a card with several sizes is under its name alone with the smallest
CARDS: dict[str, tuple[int, tuple[int, int]]] = {
    "gtx 1060": (6, (6, 1)), "gtx 1070": (8, (6, 1)), "gtx 1080": (8, (6, 1)), "gtx 1080 ti": (11, (6, 1)),
    "v100": (16, (7, 0)), "t4": (16, (7, 5)), "gtx 1650": (4, (7, 5)), "gtx 1660": (6, (7, 5)),
    "rtx 2060": (6, (7, 5)), "rtx 2060 12gb": (12, (7, 5)), "rtx 2070": (8, (7, 5)), "rtx 2080": (8, (7, 5)),
    "rtx 2080 ti": (11, (7, 5)), "rtx 3050": (8, (8, 6)), "rtx 3060": (12, (8, 6)), "rtx 3060 8gb": (8, (8, 6)),
    "rtx 3060 ti": (8, (8, 6)), "rtx 3070": (8, (8, 6)), "rtx 3080": (10, (8, 6)), "rtx 3080 12gb": (12, (8, 6)),
    "rtx 3090": (24, (8, 6)), "rtx 4060": (8, (8, 9)), "rtx 4060 ti": (8, (8, 9)), "rtx 4060 ti 16gb": (16, (8, 9)),
    "rtx 4070": (12, (8, 9)), "rtx 4070 ti": (12, (8, 9)), "rtx 4080": (16, (8, 9)), "rtx 4090": (24, (8, 9)),
    "rtx 5060": (8, (12, 0)), "rtx 5060 ti 16gb": (16, (12, 0)), "rtx 5070": (12, (12, 0)),
    "rtx 5070 ti": (16, (12, 0)), "rtx 5080": (16, (12, 0)), "rtx 5090": (32, (12, 0)), "a100": (40, (8, 0)),
    "h100": (80, (9, 0)), "h200": (141, (9, 0)),
}  # fmt: skip


def family_of(capability: tuple[int, int]) -> str:
    """The name of a compute capability's family, as "Turing"; the number for one that is not known."""
    special = {(7, 5): "Turing", (8, 9): "Ada"}
    major, minor = capability
    return special.get(capability) or FAMILIES.get(major, f"compute capability {major}.{minor}")


def card_named(name: str) -> tuple[int, tuple[int, int]] | None:
    """GiB and compute capability of a card by its name, with or without "NVIDIA GeForce"; None if unknown."""
    words = name.lower().replace("nvidia", "").replace("geforce", "").split()
    return CARDS.get(" ".join(words))
