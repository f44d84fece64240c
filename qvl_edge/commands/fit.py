"""Estimate a model's memory use before it is loaded or downloaded: qvl-edge fit PATH [--gpu 12GB] [--context 4096]

PATH is a bundle, a checkpoint, a folder with nothing but its config.json, or the name of a model on a hub, of which
only the settings are fetched (those of Qwen/Qwen-VL, Qwen/Qwen-VL-Chat and Qwen/Qwen-VL-Chat-Int4 are built in). A GB
is 10^9 bytes; a card that is sold as 12 GB has 12GiB.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qvl_edge.commands.loading import add_source, can_show, colourful
from qvl_edge.options import PROFILES

if TYPE_CHECKING:
    from qvl_edge.config import Config
    from qvl_edge.engine.budget import Budget, Plan
    from qvl_edge.options import Source

EXAMPLES = """examples:
  qvl-edge fit Qwen/Qwen-VL-Chat-Int4 --gpu 12GB
  qvl-edge fit BUNDLE --cpu 16GB --context 4096"""
WIDTH = 56  # characters of a whole bar
FILLS = "█▓▒░▞▚·"  # one for each part, told apart without colour
PLAIN_FILLS, PLAIN = "#@%*+=.", str.maketrans("▏–", "|-")  # for a terminal whose encoding has none of these
COLOURS = (34, 36, 32, 33, 35, 31, 90)
NAMES = {
    "layers": "decoder layers",
    "embeddings": "embeddings",
    "head": "lm_head",
    "vision": "vision tower",
    "kv_cache": "keys and values",
    "workspace": "workspace",
    "runtime": "runtime",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `qvl-edge fit`."""
    parser.add_argument("path", metavar="PATH", help="a bundle, a checkpoint, its config.json's folder, or a name")
    add_source(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--gpu",
        metavar="12GB",
        help='the card, as in "RTX 3060", or its memory; 12 alone is 12GB (default: what is free on this one)',
    )
    where.add_argument(
        "--cpu", metavar="16GB", nargs="?", const="", help="run on the CPU, with this memory (default: what is free)"
    )
    parser.add_argument("--context", type=int, default=2048, metavar="N", help="positions (default: 2048)")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="images encoded at once (default: 1)")
    parser.add_argument(
        "--slots", type=int, default=1, metavar="N", help="answers at once, each with its own context (default: 1)"
    )
    parser.add_argument("--activations", choices=("float", "int8"), help="of a CPU's products (default: int8)")
    parser.add_argument("--json", action="store_true", help="bytes as JSON on stdout")


def execute(args: argparse.Namespace) -> int:
    """Print the table; 0 if some profile fits, 1 if none does."""
    import torch

    from qvl_edge.engine.budget import Plan, by_profile, estimate, longest_context
    from qvl_edge.errors import ConfigError
    from qvl_edge.options import LoadOptions

    config, note = read_config(args.path, source=args.source, revision=args.revision)
    if not 0 < args.context <= config.max_position_embeddings:
        raise ConfigError(
            f"--context is {args.context}, this model takes 1 to {config.max_position_embeddings} positions"
        )
    for name in ("images", "slots"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}, at least 1 is needed")
    device, memory, turing = memory_of(args)
    dtype = torch.float32 if device == "cpu" else torch.float16
    asked = Plan(
        device,
        dtype,
        context=args.context,
        images=args.images,
        slots=args.slots,
        turing=turing,
        activations=LoadOptions(activations=args.activations).activations_on(device),
    )
    rows = []
    for name in PROFILES:
        plan = by_profile(asked, name)
        rows.append((name, plan, estimate(config, plan), longest_context(config, plan, memory)))
    if args.json:
        found = {
            name: {"parts": vars(budget), "total": budget.total, "fits": budget.total <= memory, "longest": longest}
            for name, _, budget, longest in rows
        }
        print(json.dumps({"memory": memory, "device": device, "profiles": found}))
    else:
        title = f"{args.path}{note}{tower_note(Path(args.path))}\n{args.context:,} positions"
        title += f" in each of {args.slots} slots" if args.slots > 1 else ""
        title += f", {args.images} image{'s' if args.images > 1 else ''} at once, {device.upper()}"
        print(table(title, rows, memory))
    return 0 if any(budget.total <= memory for _, _, budget, _ in rows) else 1


def read_config(path: str, *, source: "Source" = "hf", revision: str | None = None) -> tuple["Config", str]:
    """The config to estimate, and a note for the title."""
    from qvl_edge.checkpoint import refuse_adapter
    from qvl_edge.config import Config, QuantConfig
    from qvl_edge.hub import local_folder
    from qvl_edge.published import published_config

    config = None if Path(path).exists() else published_config(path)
    if config is None:
        settings = ("config.json", "quantize_config.json")
        folder = local_folder(path, source=source, revision=revision, only=settings)
        if folder.is_dir():
            refuse_adapter(folder)
        config = Config.from_folder(folder)
    if config.quantization is not None:
        return config, ""
    return replace(config, quantization=QuantConfig()), "\nas quantized by quantize.gptq, 4 bits in groups of 128"


def tower_note(path: Path) -> str:
    """Which profiles a bundle's vision tower is for; nothing for any other model, whose tower is made as they ask."""
    from qvl_edge.bundle import read_manifest
    from qvl_edge.engine.budget import towers

    if not (tower := read_manifest(path).get("vit", {}).get("dtype")):
        return ""
    fitting = ", ".join(name for name in PROFILES if tower in towers(name))
    return f"\nits vision tower is in {tower}: profile {fitting}; another one needs another export"


def memory_of(args: argparse.Namespace) -> tuple[str, int, bool]:
    """The device type, its bytes, and whether it is a card of Turing. ConfigError for one that is too old."""
    import torch

    from qvl_edge.cards import card_named
    from qvl_edge.engine.device import BFLOAT16, is_turing, too_old
    from qvl_edge.errors import ConfigError
    from qvl_edge.memory import free_memory, parse_bytes

    if args.gpu and (card := card_named(args.gpu)) is not None:
        if (old := too_old(args.gpu, card[1])) is not None:
            raise ConfigError("; ".join(old))
        return "cuda", card[0] << 30, card[1] < BFLOAT16
    if args.gpu:
        return "cuda", parse_bytes(args.gpu), False
    if args.cpu:
        return "cpu", parse_bytes(args.cpu), False
    device = torch.device("cuda" if args.cpu is None and torch.cuda.is_available() else "cpu")
    return device.type, free_memory(device), is_turing(device)


def table(title: str, rows: list[tuple[str, "Plan", "Budget", int]], memory: int) -> str:
    """Parts by profile in GB, whether they fit, and a bar for each."""
    colour, fills = colourful(), FILLS if can_show(f"{FILLS}▏–") else PLAIN_FILLS

    def painted(text: str, index: int) -> str:
        return f"\033[{COLOURS[index]}m{text}\033[0m" if colour else text

    lines = [title, "", f"{'GB':<20}" + "".join(f"{name:>10}" for name, *_ in rows)]
    for index, (part, name) in enumerate(NAMES.items()):
        sizes = [getattr(budget, part) for _, _, budget, _ in rows]
        label = f"{painted(fills[index], index)} {name:<18}"
        lines.append(label + "".join(f"{size / 1e9:>10.2f}" if size else f"{'–':>10}" for size in sizes))
    lines.append(f"{'total':<20}" + "".join(f"{budget.total / 1e9:>10.2f}" for _, _, budget, _ in rows))
    verdicts = ("fits" if budget.total <= memory else "too large" for _, _, budget, _ in rows)
    lines.append(f"{f'of {memory / 1e9:.2f} GB':<20}" + "".join(f"{verdict:>10}" for verdict in verdicts))
    longest = (f"{positions:,}" if positions else "none" for *_, positions in rows)
    lines.append(f"{'longest context':<20}" + "".join(f"{positions:>10}" for positions in longest))
    whole = max(memory, *(budget.total for _, _, budget, _ in rows))
    lines.append("")
    for name, plan, budget, _ in rows:
        bar, end, done = "", 0, 0
        for index, part in enumerate(NAMES):
            done += getattr(budget, part)
            start, end = end, round(WIDTH * done / whole)
            bar += painted(fills[index] * (end - start), index)
        gap = round(WIDTH * memory / whole) - end  # up to the end of the memory
        over = budget.total - memory
        tail = f" {over / 1e9:.2f} GB over" if over > 0 else f"{' ' * gap}▏"
        lines.append(f"{name:>4} {bar}{tail}")
        lines.append(f"     vision tower {plan.vit}, lm_head and cache {plan.precision('head')}")
    text = "\n".join(lines)
    return text if fills == FILLS else text.translate(PLAIN)
