"""Quantization error by layer: python -m benchmarks.layers CHECKPOINT BUNDLE DATA

For every block of the float CHECKPOINT and of BUNDLE (or an int4 checkpoint), on the samples of DATA (a calibration
file of quantize.gptq): the relative squared error |found - exact|² / |exact|² of the outputs of each projection and of
the block, both on the float model's input, and of the residual stream after the block, where each model continues with
its own. Both models run in float32, one block of each in memory.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.report import add_save, command, exits_with_its_message, save
from quantize.blocks import block_name, load_block, projection, run_block
from quantize.calibration import Activations, embed_samples, writing
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config
from qvl_edge.errors import ConfigError
from qvl_edge.lora import open_checkpoint
from qvl_edge.model.decoder import QWenBlock
from qvl_edge.model.loading import QUANTIZED, check_tensors, read_projection
from qvl_edge.text.conversations import Sample, read_samples
from qvl_edge.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class BlockError:
    """Relative squared errors of one block."""

    block: int
    projections: dict[str, float]
    output: float  # of the block, on the float model's input
    stream: float  # of the residual stream after it, including errors of earlier blocks


@dataclass
class _Ratio:
    """|found - exact|² / |exact|² over everything added; 0 for 0 / 0."""

    lost: float = 0.0
    whole: float = 0.0

    def add(self, found: Tensor, exact: Tensor) -> None:
        self.lost += float((found - exact).square().sum(dtype=torch.float64))
        self.whole += float(exact.square().sum(dtype=torch.float64))

    def value(self) -> float:
        return self.lost / self.whole if self.lost else 0.0


def load_quantized_block(checkpoint: Checkpoint, index: int, device: torch.device | str) -> QWenBlock:
    """Block `index` of a GPTQ checkpoint, dequantized to float32."""
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
        module.bias = parameter(checkpoint[f"{prefix}.{layer}.bias"])  # all projections have one on disk
    return block.eval()


def compare_layers(
    exact: Checkpoint, quantized: Checkpoint, samples: Sequence[Sample], folder: Path, *, device: str = "cpu"
) -> Iterator[BlockError]:
    """Block by block. `folder` holds the blocks' inputs and outputs, four times the samples in float32.

    ConfigError if the two are not the same model before and after quantizing.
    """
    config, other = exact.config, quantized.config
    if config.quantization is not None or other.quantization is None or _bare(config) != _bare(other):
        raise ConfigError(
            f"{exact.path} and {quantized.path} are not a float model and the same one quantized by GPTQ; give a float "
            "checkpoint first, then the bundle made from it"
        )
    for checkpoint in (exact, quantized):
        check_tensors(checkpoint, visual=False)
    lengths, width = [len(sample.ids) for sample in samples], config.hidden_size
    paths = [folder / "0.float32", folder / "0.float32"]  # inputs of a block: float model, quantized model
    with torch.inference_mode(), writing(paths[0], lengths, width) as put:
        embed_samples(exact, samples, put, device=device, say=lambda text: None)
    for index in range(config.num_hidden_layers):
        with torch.inference_mode():
            float_block = load_block(exact, index, device)
            int4_block = load_quantized_block(quantized, index, device)
            ratios = {layer: _Ratio() for layer in QUANTIZED}
            for layer, ratio in ratios.items():
                _watch(projection(float_block, layer), projection(int4_block, layer), ratio)
            given, own = (Activations(path, lengths, width) for path in paths)
            runs = ((float_block, given), (int4_block, given), (int4_block, own))
            outputs = [run_block(block, config, index, inputs, device, lambda *_: None) for block, inputs in runs]
            output, stream = _Ratio(), _Ratio()
            after = [folder / f"{index + 1}.float32", folder / f"{index + 1}.int4.float32"]
            with writing(after[0], lengths, width) as put, writing(after[1], lengths, width) as put_own:
                for number, (right, found, found_own) in enumerate(zip(*outputs, strict=True)):
                    output.add(found, right)
                    stream.add(found_own, right)
                    put(number, 0, right)
                    put_own(number, 0, found_own)
            for path in set(paths):
                path.unlink()
            paths = after
        errors = {layer: ratio.value() for layer, ratio in ratios.items()}
        yield BlockError(index, errors, output.value(), stream.value())


def _bare(config: Config) -> Config:
    return replace(config, quantization=None, torch_dtype="float16")


def _watch(exact: nn.Linear, found: nn.Linear, ratio: _Ratio) -> None:
    """Whenever `exact` runs, run `found` on the same input and add the error to `ratio`."""
    exact.register_forward_hook(lambda _, inputs, output: ratio.add(found(inputs[0]), output))


@exits_with_its_message("benchmarks.layers")
def main() -> None:
    parser = command("layers", __doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("data", type=Path, metavar="DATA", help="conversations (.json, .jsonl) or texts (.jsonl, .txt)")
    parser.add_argument("--lora", type=Path, metavar="DIR", help="the LoRA adapter merged into BUNDLE")
    parser.add_argument("--samples", type=int, default=32, help="at most this many entries (default: 32)")
    parser.add_argument("--seqlen", type=int, default=2048, help="at most this many tokens each (default: 2048)")
    parser.add_argument("--seed", type=int, default=0, help="for choosing entries of a longer file (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_save(parser)
    args = parser.parse_args()
    exact = open_checkpoint(args.checkpoint, args.lora)
    quantized = Checkpoint(args.bundle)
    tokenizer = Tokenizer.from_folder(exact.path, exact.config)
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
