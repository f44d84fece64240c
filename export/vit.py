"""Export the vision tower of a checkpoint as an ONNX graph, and put it into a bundle once it has passed a comparison.

    python -m export.vit CHECKPOINT BUNDLE [--dtype float16|float32|int8|int4] [--lora DIR]

Progress goes to stderr, the parity report to stdout.
"""

import argparse
import sys
from pathlib import Path

from export.part import export_vit
from export.precision import ALLOWED_BLOCK_SIZES, BLOCK_SIZES
from qvl_edge.bundle import VIT, VIT_DATA, VIT_DTYPES
from qvl_edge.commands.loading import add_source, any_console, run_command, say
from qvl_edge.hub import local_folder
from qvl_edge.lora import open_checkpoint
from qvl_edge.memory import peak_host_bytes


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    any_console()
    args = _parser().parse_args(argv)
    stopped = f"stopped; {args.bundle} is unchanged. Run the same command again to start over"
    return run_command("error", lambda: _execute(args), stopped=stopped)


def _execute(args: argparse.Namespace) -> int:
    folder = local_folder(args.checkpoint, source=args.source, revision=args.revision, progress=say)
    lora = args.lora and local_folder(args.lora, source=args.source, progress=say)
    export_vit(
        open_checkpoint(folder, lora),
        args.bundle,
        dtype=args.dtype,
        block_size=args.block_size,
        progress=say,
        on_parity=lambda parity: print(parity.report(per_layer=args.per_layer), flush=True),
    )
    size = sum((args.bundle / name).stat().st_size for name in (VIT, VIT_DATA))
    peak = f"took {peak_host_bytes() / 1e9:.2f} GB of memory at most"
    say(f"wrote {args.bundle / VIT} and {VIT_DATA}, {size / 1e6:.1f} MB; {peak}")
    return 0


def _parser() -> argparse.ArgumentParser:
    description, _, notes = (__doc__ or "").strip().split("\n\n")
    parser = argparse.ArgumentParser(prog="python -m export.vit", description=description, epilog=notes)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="its folder, or OWNER/NAME on a hub")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder to write to; made if needed")
    add_source(parser)
    parser.add_argument("--lora", metavar="DIR", help="merge this PEFT adapter (quantize.gptq needs it too)")
    parser.add_argument("--dtype", choices=VIT_DTYPES, default="float16", help="of the weights (default: float16)")
    blocks = ", ".join(f"{size} for {dtype}" for dtype, size in BLOCK_SIZES.items())
    parser.add_argument(
        "--block-size",
        type=int,
        choices=ALLOWED_BLOCK_SIZES,
        help=f"weights that share one scale, in int8 and int4 (default: {blocks})",
    )
    parser.add_argument("--per-layer", action="store_true", help="report the comparison after every block")
    return parser


if __name__ == "__main__":
    sys.exit(main())
