"""Make the int4 decoder of a bundle:  python -m quantize.gptq CHECKPOINT BUNDLE --calibration conversations.json

CHECKPOINT is Qwen-VL, Qwen-VL-Chat or a fine-tune of them (quantized by GPTQ), or Qwen-VL-Chat-Int4 (checked, copied):
its folder, or its name on a hub (Qwen/Qwen-VL-Chat), from which it is downloaded.
The per-layer table goes to stdout, progress to stderr. Stopped at any moment, the same command resumes.
"""

import argparse
import io
import sys
import time
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from quantize.job import Event, Result, quantize_checkpoint
from quantize.repack import repack_checkpoint
from qvl_edge.bundle import COMMANDS, VIT, read_manifest
from qvl_edge.checkpoint import Checkpoint, raw_reason
from qvl_edge.commands.loading import add_source, any_console, run_command
from qvl_edge.config import QuantConfig
from qvl_edge.engine.device import find_device
from qvl_edge.errors import CalibrationError, ConfigError
from qvl_edge.hub import local_folder
from qvl_edge.lora import open_checkpoint
from qvl_edge.text.conversations import Sample, read_samples
from qvl_edge.text.entries import EXAMPLE
from qvl_edge.text.tokenizer import Tokenizer

QUANT_OPTIONS = {  # fields of QuantConfig, in GPTQ's own names
    "bits": "bits per weight",
    "group_size": "input channels that share one scale: a multiple of 32, or -1 for all of them",
    "damp_percent": "share of the Hessian's mean diagonal that is added to it",
    "desc_act": "quantize channels in descending order of activation",
    "static_groups": "fix all scales before the first column is quantized",
    "sym": "zero point is the middle level",
    "true_sequential": "later projections of a block see the quantized earlier ones",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; options of QuantConfig that were not given are None."""
    parser = argparse.ArgumentParser(
        prog="python -m quantize.gptq",
        description=(__doc__ or "").split("\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    add_source(parser)
    parser.add_argument("--lora", metavar="DIR", help="merge this PEFT adapter (export.vit needs it too)")
    data = parser.add_argument_group("calibration")
    data.add_argument(
        "--calibration", type=Path, metavar="FILE", help="conversations (.json, .jsonl) or texts (.jsonl, .txt)"
    )
    data.add_argument("--images", type=Path, metavar="DIR", help="where paths of images begin (default: beside FILE)")
    data.add_argument("--samples", type=int, default=128, help="use at most this many of its entries (default: 128)")
    data.add_argument("--seqlen", type=int, default=2048, help="cut each to this many tokens (default: 2048)")
    data.add_argument("--seed", type=int, default=0, help="selects the entries of a longer file (default: 0)")
    data.add_argument("--round-to-nearest", action="store_true", help="no calibration: for comparison, less exact")
    group = parser.add_argument_group("quantization")
    for name, text in QUANT_OPTIONS.items():
        flag, default = f"--{name.replace('_', '-')}", getattr(QuantConfig(), name)
        if isinstance(default, bool):
            text = f"{text} (default: {'on' if default else 'off'})"
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            choices = (4, 8) if name == "bits" else None
            group.add_argument(flag, type=type(default), choices=choices, help=f"{text} (default: {default})")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto: CUDA where there is one)")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished decoder or other unfinished work")
    return parser.parse_args(arguments)


class Display:
    """The table on stdout; on stderr a progress bar on a terminal, elsewhere a line at most every ten seconds."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._shown, self._header = 0.0, False

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if event.layer is not None:
            if not self._header:
                self._header = True
                titles = f"{'projection':<34}{'inputs':>8}{'outputs':>9}{'error':>11}{'rounding':>11}{'damp':>8}"
                self._print(titles, sys.stdout)
            row = event.layer
            damp = "" if row.damp_percent is None else f"{row.damp_percent:.3g}"
            self._print(
                f"{row.name:<34}{row.in_features:>8}{row.out_features:>9}{row.error:>11.2e}"
                f"{row.round_to_nearest_error:>11.2e}{damp:>8}",
                sys.stdout,
            )
        if event.lasting:
            self.say(event.text)
            return
        if self._bar is None:
            bar = "|{bar:20}|" if self._live else ""
            self._bar = tqdm(
                total=1.0,
                bar_format="{percentage:3.0f}%" + bar + " {desc} [{elapsed}<{remaining}]",
                file=sys.stderr if self._live else io.StringIO(),  # elsewhere tqdm only keeps the time
                leave=False,
                dynamic_ncols=True,
            )
        if event.resumed:  # the time that is left is estimated from this run's own work
            self._bar.initial, self._bar.start_t = event.fraction, time.time()
        self._bar.n = event.fraction
        self._bar.set_description_str(event.text, refresh=False)
        if self._live:
            self._bar.refresh()
        elif time.monotonic() - self._shown > 10:
            self._shown = time.monotonic()
            self._print(str(self._bar), sys.stderr)

    def say(self, line: str) -> None:
        """A line on stderr that stays."""
        self._print(line, sys.stderr)

    def _print(self, line: str, file: TextIO) -> None:
        with tqdm.external_write_mode(file=file):
            print(line, file=file, flush=True)

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.close()


def load_samples(args: argparse.Namespace, checkpoint: Checkpoint) -> list[Sample] | None:
    """The calibration samples that were asked for; None for --round-to-nearest. CalibrationError if neither was."""
    if args.round_to_nearest:
        if args.calibration is not None:
            raise CalibrationError("--round-to-nearest uses no data; leave --calibration out, or --round-to-nearest")
        return None
    if args.calibration is None:
        raise CalibrationError(
            f"{args.checkpoint} holds float weights, and GPTQ needs calibration data. Give your fine-tuning data, or "
            f"conversations like those that the model will have:\n  --calibration conversations.json\n{EXAMPLE}\n"
            "128 entries are enough. --round-to-nearest needs none and is less exact."
        )
    tokenizer = Tokenizer.from_folder(checkpoint.path, checkpoint.config)
    return read_samples(
        args.calibration,
        tokenizer,
        samples=args.samples,
        seqlen=args.seqlen,
        seed=args.seed,
        images=args.images,
    )


def check_repack(args: argparse.Namespace, quant: QuantConfig) -> None:
    """ConfigError if options ask for another quantization than the checkpoint's."""
    if args.calibration is not None or args.round_to_nearest:
        raise ConfigError(
            f"{args.checkpoint} is quantized already and will be copied; leave --calibration and --round-to-nearest "
            "out, or give the float checkpoint"
        )
    for option in QUANT_OPTIONS:
        asked, is_now = getattr(args, option), getattr(quant, option)
        if asked is not None and asked != is_now:
            raise ConfigError(
                f"{args.checkpoint} is quantized already with {option} {is_now}, and {asked} was asked for; leave the "
                "option out, or give the float checkpoint"
            )


def run(args: argparse.Namespace, display: Display) -> Result:
    """Quantize or copy, as the checkpoint is float or int4."""
    folder = local_folder(args.checkpoint, source=args.source, revision=args.revision, progress=display.say)
    lora = args.lora and local_folder(args.lora, source=args.source, progress=display.say)
    checkpoint = open_checkpoint(folder, lora)
    if reason := raw_reason(folder):
        display.say(f"warning: {reason}. The bundle takes over what is there")
    if checkpoint.config.quantization is not None:
        check_repack(args, checkpoint.config.quantization)
        made = repack_checkpoint(checkpoint, args.bundle, overwrite=args.overwrite, progress=display)
        return Result([], already_done=not made)
    quant = QuantConfig(**{name: value for name in QUANT_OPTIONS if (value := getattr(args, name)) is not None})
    device = find_device(args.device, kernels=False)  # before the samples, which take a while
    samples = load_samples(args, checkpoint)
    return quantize_checkpoint(
        checkpoint, args.bundle, quant, samples, device=str(device), overwrite=args.overwrite, progress=display
    )


def summary(folder: Path, result: Result) -> str:
    """What the bundle holds now, and the next step."""
    parts = read_manifest(folder)
    entry = parts["decoder"]
    megabytes = sum(file["bytes"] for file in entry["files"].values()) / 1e6
    quant = entry["quantization"]
    state = "already done with these settings" if result.already_done else "done"
    text = f"{folder}: {state}. Decoder, {quant['bits']} bits, groups of {quant['group_size']}, {megabytes:.1f} MB."
    if result.layers:
        error = sum(row.error for row in result.layers) / len(result.layers)
        rounding = sum(row.round_to_nearest_error for row in result.layers) / len(result.layers)
        text += f" Mean error {error:.2e}, by rounding to nearest {rounding:.2e}."
    return text if "vit" in parts else f"{text}\nNext, {VIT}:\n  {COMMANDS['vit'].format(path=folder)}"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    any_console()
    args = parse(arguments)
    display = Display()

    def execute() -> int:
        try:
            result = run(args, display)
        finally:
            display.close()
        print(summary(args.bundle, result))
        return 0

    stopped = f"\nstopped. Finished blocks are kept in {args.bundle}; the same command resumes."
    return run_command("error", execute, stopped=stopped)


if __name__ == "__main__":
    sys.exit(main())
