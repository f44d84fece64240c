"""Make the int4 decoder of a bundle:  python -m quantize.gptq CHECKPOINT BUNDLE --calibration conversations.json

CHECKPOINT is Qwen-VL, Qwen-VL-Chat or a fine-tune of them (quantized by GPTQ), or Qwen-VL-Chat-Int4 (checked, copied):
its folder, or its name on a hub (Qwen/Qwen-VL-Chat), from which it is fetched.
The per-layer table goes to stdout, progress to stderr. Stopped at any moment, the same command goes on where it was.
"""

import argparse
import sys
import time
from pathlib import Path

from quantize.job import Result, check_device, default_device, quantize_checkpoint
from quantize.progress import Event, LayerReport
from quantize.repack import repack_checkpoint
from qvl_edge.bundle import COMMANDS, VIT, read_manifest
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.commands.loading import add_source
from qvl_edge.config import QuantConfig
from qvl_edge.errors import CalibrationError, ConfigError, QvlError
from qvl_edge.hub import local_folder
from qvl_edge.lora import open_checkpoint
from qvl_edge.text.conversations import EXAMPLE, Sample, check_tokenizer, read_samples
from qvl_edge.text.tokenizer import VOCAB_FILE, Tokenizer

_QUANT_OPTIONS = ("bits", "group_size", "damp_percent", "desc_act", "static_groups", "sym", "true_sequential")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; options of QuantConfig that were not given are None."""
    default = QuantConfig()
    parser = argparse.ArgumentParser(
        prog="python -m quantize.gptq",
        description=(__doc__ or "").split("\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    add_source(parser)
    parser.add_argument("--lora", type=Path, metavar="DIR", help="merge this PEFT adapter (export.vit needs it too)")
    data = parser.add_argument_group("calibration")
    data.add_argument(
        "--calibration", type=Path, metavar="FILE", help="conversations (.json, .jsonl) or texts (.jsonl, .txt)"
    )
    data.add_argument("--samples", type=int, default=128, help="at most this many of its entries (default: 128)")
    data.add_argument("--seqlen", type=int, default=2048, help="at most this many tokens each (default: 2048)")
    data.add_argument("--seed", type=int, default=0, help="chooses the entries of a longer file (default: 0)")
    data.add_argument("--round-to-nearest", action="store_true", help="no calibration: for comparison, less exact")
    quant = parser.add_argument_group("quantization")
    quant.add_argument("--bits", type=int, choices=(4, 8), help=f"default: {default.bits}")
    quant.add_argument("--group-size", type=int, help=f"-1 or a multiple of 32 (default: {default.group_size})")
    quant.add_argument("--damp-percent", type=float, help=f"default: {default.damp_percent}")
    for option, text in (
        ("desc-act", "take channels in the order of falling activation"),
        ("static-groups", "fix all scales before the first column is quantized"),
        ("sym", "zero point is the middle level"),
        ("true-sequential", "later projections of a block see the quantized earlier ones"),
    ):
        on = "on" if getattr(default, option.replace("-", "_")) else "off"
        quant.add_argument(
            f"--{option}", action=argparse.BooleanOptionalAction, default=None, help=f"{text} (default: {on})"
        )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished decoder or other unfinished work")
    return parser.parse_args(arguments)


class Printer:
    """Rows of the table on stdout, where it stands on stderr."""

    def __init__(self) -> None:
        self._began, self._from, self._shown = time.perf_counter(), 0.0, 0.0
        self._live = sys.stderr.isatty()
        self._header = False

    def __call__(self, event: Event) -> None:
        """Show an event; on a terminal the status stays on one line, elsewhere at most one line in ten seconds."""
        now = time.perf_counter()
        if event.layer is not None:
            self._clear()
            self._row(event.layer)
            if event.text == "finished by an earlier run":
                self._began, self._from = now, event.fraction
        if event.lasting:
            self._clear()
            print(event.text, file=sys.stderr, flush=True)
        elif self._live or now - self._shown > 10:
            self._shown = now
            line = f"{event.fraction:4.0%}  {event.text}{self._left(event.fraction, now)}"
            print(
                f"\r{line[:100]:<100}" if self._live else line,
                end="" if self._live else "\n",
                file=sys.stderr,
                flush=True,
            )

    def say(self, line: str) -> None:
        """A line of the download, on stderr."""
        self._clear()
        print(line, file=sys.stderr, flush=True)

    def _left(self, fraction: float, now: float) -> str:
        if fraction - self._from < 0.01 or fraction >= 1:
            return ""
        seconds = (now - self._began) * (1 - fraction) / (fraction - self._from)
        return f", {seconds / 60:.0f} min left" if seconds > 90 else f", {seconds:.0f} s left"

    def _row(self, row: LayerReport) -> None:
        if not self._header:
            self._header = True
            print(f"{'projection':<34}{'inputs':>8}{'outputs':>9}{'error':>11}{'rounding':>11}{'damp':>8}")
        damp = "" if row.damp_percent is None else f"{row.damp_percent:.3g}"
        print(
            f"{row.name:<34}{row.in_features:>8}{row.out_features:>9}{row.error:>11.2e}"
            f"{row.round_to_nearest_error:>11.2e}{damp:>8}",
            flush=True,
        )

    def _clear(self) -> None:
        if self._live:
            print(f"\r{'':<100}\r", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the line."""
        self._clear()


def load_samples(args: argparse.Namespace, checkpoint: Checkpoint) -> list[Sample] | None:
    """The calibration samples that were asked for; None for --round-to-nearest. CalibrationError if neither was."""
    if args.round_to_nearest:
        if args.calibration is not None:
            raise CalibrationError("--round-to-nearest uses no data; leave --calibration out, or --round-to-nearest")
        return None
    if args.calibration is None:
        raise CalibrationError(
            f"{args.checkpoint} holds float weights, and GPTQ needs to see typical inputs. Give your fine-tuning data "
            f"or conversations like those that the model will have:\n  --calibration conversations.json\n{EXAMPLE}\n"
            "128 entries are enough. --round-to-nearest needs none and is less exact."
        )
    tokenizer = Tokenizer.from_file(checkpoint.path / VOCAB_FILE)
    check_tokenizer(tokenizer, checkpoint.config)
    return read_samples(args.calibration, tokenizer, samples=args.samples, seqlen=args.seqlen, seed=args.seed)


def check_repack(args: argparse.Namespace, quant: QuantConfig) -> None:
    """ConfigError if options ask for something else than what a quantized checkpoint is."""
    if args.calibration is not None or args.round_to_nearest:
        raise ConfigError(
            f"{args.checkpoint} is quantized already and will be copied; leave --calibration and --round-to-nearest "
            "out, or give the float checkpoint"
        )
    for option in _QUANT_OPTIONS:
        asked, is_now = getattr(args, option), getattr(quant, option)
        if asked is not None and asked != is_now:
            raise ConfigError(
                f"{args.checkpoint} is quantized already with {option} {is_now}, and {asked} was asked for; leave the "
                "option out, or give the float checkpoint"
            )


def run(args: argparse.Namespace, progress: Printer) -> Result:
    """Do what was asked for."""
    folder = local_folder(args.checkpoint, source=args.source, revision=args.revision, progress=progress.say)
    checkpoint = open_checkpoint(folder, args.lora)
    if checkpoint.config.quantization is not None:
        check_repack(args, checkpoint.config.quantization)
        made = repack_checkpoint(checkpoint, args.bundle, overwrite=args.overwrite, progress=progress)
        return Result([], already_done=not made)
    given = {option: value for option in _QUANT_OPTIONS if (value := getattr(args, option)) is not None}
    quant = QuantConfig(**given)
    device = args.device or default_device()
    check_device(device)
    samples = load_samples(args, checkpoint)
    return quantize_checkpoint(
        checkpoint, args.bundle, quant, samples, device=device, overwrite=args.overwrite, progress=progress
    )


def summary(folder: Path, result: Result) -> str:
    """What the bundle holds now, and the next step."""
    parts = read_manifest(folder)
    entry = parts["decoder"]
    size = sum(file["bytes"] for file in entry["files"].values()) / 1e6
    quant = entry["quantization"]
    state = "already done with these settings" if result.already_done else "done"
    text = f"{folder}: {state}. Decoder, {quant['bits']} bits, groups of {quant['group_size']}, {size:.1f} MB."
    if result.layers:
        error = sum(row.error for row in result.layers) / len(result.layers)
        rounding = sum(row.round_to_nearest_error for row in result.layers) / len(result.layers)
        text += f" Mean error {error:.2e}, by rounding to nearest {rounding:.2e}."
    return text if "vit" in parts else f"{text}\nNext, {VIT}:\n  {COMMANDS['vit'].format(path=folder)}"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(arguments)
    printer = Printer()
    try:
        result = run(args, printer)
    except QvlError as error:
        printer.close()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        printer.close()
        print(
            f"\nstopped. What is finished is kept in {args.bundle}; the same command goes on from there.",
            file=sys.stderr,
        )
        return 130
    printer.close()
    print(summary(args.bundle, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
