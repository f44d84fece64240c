"""Quantization error by layer: python -m benchmarks.layers CHECKPOINT BUNDLE DATA

For every block of the float CHECKPOINT and of BUNDLE (or of an int4 checkpoint), on the samples of DATA (a calibration
file as quantize.gptq takes it): the relative squared error |found - exact|² / |exact|² of each projection's output and
of the block's, both given the float model's input of that block, and of the residual stream after the block, where each
model continues with its own. Both are computed in float32, with one block of each in memory.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.report import add_save, command, exits_with_its_message, save
from quantize.blocks import Tick, block_name, load_block, projection, run_block
from quantize.calibration import Activations, embed_samples, writing
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config
from qvl_edge.errors import ConfigError
from qvl_edge.lora import open_checkpoint
from qvl_edge.model.decoder import QWenBlock
from qvl_edge.model.loading import QUANTIZED, check_tensors, read_projection
from qvl_edge.text.conversations import Sample, read_samples
from qvl_edge.text.tokenizer import VOCAB_FILE, Tokenizer


@dataclass(frozen=True)
class BlockError:
    """Relative squared errors of one block."""

    block: int
    projections: dict[str, float]
    output: float  # of the block, given what enters the float model's
    stream: float  # of the residual stream after it, errors of earlier blocks included


@dataclass
class _Ratio:
    """|found - exact|² / |exact|² over what was added; 0 for 0 / 0."""

    lost: float = 0.0
    whole: float = 0.0

    def add(self, found: Tensor, exact: Tensor) -> None:
        self.lost += float((found - exact).square().sum(dtype=torch.float64))
        self.whole += float(exact.square().sum(dtype=torch.float64))

    def value(self) -> float:
        return self.lost / self.whole if self.lost else 0.0


def load_quantized_block(checkpoint: Checkpoint, index: int, device: torch.device | str) -> QWenBlock:
    """Block `index` of a GPTQ checkpoint, its projections as float32 weights of the same values."""
    with torch.device("meta"):
        block = QWenBlock(replace(checkpoint.config, quantization=None))

    def parameter(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.to(device=device, dtype=torch.float32, copy=True), requires_grad=False)

    prefix = block_name(index)
    block.ln_1.weight = parameter(checkpoint[f"{prefix}.ln_1.weight"])
    block.ln_2.weight = parameter(checkpoint[f"{prefix}.ln_2.weight"])
    for layer in QUANTIZED:
        module = projection(block, layer)
        module.weight = parameter(read_projection(checkpoint, f"{prefix}.{layer}"))
        module.bias = parameter(checkpoint[f"{prefix}.{layer}.bias"])  # on disk every projection has one
    return block.eval()


def compare_layers(
    exact: Checkpoint,
    quantized: Checkpoint,
    samples: Sequence[Sample],
    folder: Path,
    *,
    device: str = "cpu",
    tick: Tick = lambda share, text: None,
) -> Iterator[BlockError]:
    """One block after another. `folder` meanwhile holds what enters the blocks, four times the samples in float32.

    ConfigError if the two are not the same model before and after quantizing.
    """
    config, other = exact.config, quantized.config
    if config.quantization is not None or other.quantization is None or _bare(config) != _bare(other):
        raise ConfigError(
            f"{exact.path} and {quantized.path} are not a float model and the same one quantized by GPTQ; give a float "
            "checkpoint first, then the bundle that was made of it"
        )
    for checkpoint in (exact, quantized):
        check_tensors(checkpoint, visual=False)
    lengths, width = [len(sample.ids) for sample in samples], config.hidden_size
    paths = [folder / "0.float32", folder / "0.float32"]  # what enters a block of the float model, and of the other
    with torch.inference_mode(), writing(paths[0], lengths, width) as put:
        embed_samples(exact, samples, put, device=device, say=lambda text: tick(0.0, text))
    for index in range(config.num_hidden_layers):
        with torch.inference_mode():
            float_block = load_block(exact, index, device)
            int4_block = load_quantized_block(quantized, index, device)
            ratios = {layer: _Ratio() for layer in QUANTIZED}
            for layer, ratio in ratios.items():
                _watch(projection(float_block, layer), projection(int4_block, layer), ratio)
            own, given = (Activations(path, lengths, width) for path in (paths[1], paths[0]))
            outputs = zip(
                run_block(float_block, config, index, given, device, tick),
                run_block(int4_block, config, index, given, device, tick),
                run_block(int4_block, config, index, own, device, tick),
                strict=True,
            )
            output, stream = _Ratio(), _Ratio()
            after = [folder / f"{index + 1}.float32", folder / f"{index + 1}.int4.float32"]
            with writing(after[0], lengths, width) as put, writing(after[1], lengths, width) as put_own:
                for number, (right, found, found_own) in enumerate(outputs):
                    output.add(found, right)
                    stream.add(found_own, right)
                    put(number, 0, right)
                    put_own(number, 0, found_own)
            for path in set(paths):
                path.unlink()
            paths = after
        yield BlockError(
            index, {layer: ratio.value() for layer, ratio in ratios.items()}, output.value(), stream.value()
        )


def _bare(config: Config) -> Config:
    return replace(config, quantization=None, torch_dtype="float16")


def _watch(exact: nn.Linear, found: nn.Linear, ratio: _Ratio) -> None:
    """Whenever `exact` runs, run `found` on its input too and add up the error."""

    def look(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        ratio.add(found(arguments[0]), output)

    exact.register_forward_hook(look)


@exits_with_its_message("benchmarks.layers")
def main() -> None:
    """The command."""
    parser = command("layers", __doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("data", type=Path, metavar="DATA", help="conversations (.json, .jsonl) or texts (.jsonl, .txt)")
    parser.add_argument("--lora", type=Path, metavar="DIR", help="the adapter that BUNDLE was made with")
    parser.add_argument("--samples", type=int, default=32, help="at most this many of its entries (default: 32)")
    parser.add_argument("--seqlen", type=int, default=2048, help="at most this many tokens each (default: 2048)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the entries of a longer file (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_save(parser)
    args = parser.parse_args()
    exact = open_checkpoint(args.checkpoint, args.lora)
    quantized = Checkpoint(args.bundle)
    tokenizer = Tokenizer.from_file(exact.path / VOCAB_FILE)
    samples = read_samples(args.data, tokenizer, samples=args.samples, seqlen=args.seqlen, seed=args.seed)
    print("".join(f"{name:>12}" for name in ("block", *QUANTIZED, "output", "stream")))
    blocks = []
    with tempfile.TemporaryDirectory() as folder:
        for row in compare_layers(exact, quantized, samples, Path(folder), device=args.device):
            errors = [*row.projections.values(), row.output, row.stream]
            print(f"{row.block:>12}" + "".join(f"{error:>12.2e}" for error in errors), flush=True)
            blocks.append(asdict(row))
    tokens = sum(len(sample.ids) for sample in samples)
    save(args.json, "layers", args.device, samples=len(samples), tokens=tokens, blocks=blocks)


if __name__ == "__main__":
    main()
