"""Write a checkpoint of the published sizes with random weights, to measure without the published weights.

    python -m benchmarks.synthetic OUT [--int4] [--layers N] [--visual-layers N] [--seed S] [--tokenizer qwen.tiktoken]

Settings, names and shapes are those of Qwen-VL-Chat, or with --int4 of Qwen-VL-Chat-Int4. Weights are scaled so that
activations keep their magnitude through all blocks, also in float16; as in language models, some channels of the
residual are eight times as large as the rest. Answers are noise.
"""

import base64
import json
import math
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.report import command, exits_with_its_message
from qvl_edge.checkpoint import SAFETENSORS_INDEX, VISUAL
from qvl_edge.config import Config
from qvl_edge.demo import SMALL_MODEL
from qvl_edge.errors import CheckpointError
from qvl_edge.files import Layout, check_free_space, copy_file, layout_bytes, write_json, write_shard
from qvl_edge.model.loading import expected_tensors
from qvl_edge.published import CONFIG, GENERATION, QUANTIZATION
from qvl_edge.text.tokenizer import SPECIALS, VOCAB_FILE, Tokenizer

SHARD_BYTES = 2_000_000_000
_POOL = 1 << 22  # random numbers that all tensors are cut from: 16 MiB, which fit into a CPU's cache
_PIECE = _POOL // 2
_OUTLIER_EVERY, _OUTLIER_SCALE = 512, 8.0  # one channel in 512 is 8 times as large
_LEVELS_STD = math.sqrt((16**2 - 1) / 12)  # of uniform levels 0 … 15
_INTEGERS = ("qweight", "qzeros", "g_idx")
_RESIDUAL = ("attn.c_proj", "mlp.c_proj", "attn.out_proj")  # their output is added to the residual


class Values:
    """Random tensors of a config: windows of one pool, each piece with its own start and sign."""

    def __init__(self, config: Config, seed: int):
        self.config, self.seed = config, seed
        generator = torch.Generator().manual_seed(seed)
        self._normal = torch.randn(_POOL, generator=generator)
        self._words = torch.randint(-(2**31), 2**31, (_POOL,), generator=generator).to(torch.int32)
        self._values = torch.empty(_PIECE)
        self._rounded = {
            dtype: torch.empty(_PIECE, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)
        }
        self._outlier = {
            width: torch.randperm(width, generator=generator)[: max(1, width // _OUTLIER_EVERY)]
            for width in sorted({config.hidden_size, config.visual.width})
        }

    def pieces(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """The tensor `name` in pieces of at most 2 Mi values; a piece is overwritten by the next one."""
        part = name.rpartition(".")[2]
        if part == "g_idx":
            assert self.config.quantization is not None
            yield torch.arange(shape[0], dtype=dtype) // self.config.quantization.group_size
            return
        if part == "qzeros":
            yield torch.full(shape, 0x77777777, dtype=dtype)  # GPTQ stores zero - 1, and zero is 8
            return
        generator = torch.Generator().manual_seed(self.seed << 32 | zlib.crc32(name.encode()))
        row = math.prod(shape[1:])
        scale, shift = self._scale(name, shape)
        for start in range(0, shape[0], max(1, _PIECE // row)):
            rows = min(max(1, _PIECE // row), shape[0] - start)
            offset, sign = torch.randint(0, _POOL - rows * row, (2,), generator=generator).tolist()
            window = slice(offset, offset + rows * row)
            if part == "qweight":
                yield self._words[window].view(rows, row)
                continue
            # into the same memory: page faults of a fresh 8 MiB cost more than the arithmetic
            values = torch.mul(self._normal[window], scale if sign % 2 else -scale, out=self._values[: rows * row])
            values = self._with_outliers(name, values.view(rows, *shape[1:]), start)
            if shift:
                values.add_(shift)
            rounded = self._rounded[dtype][: rows * row]
            yield rounded.copy_(values.view(-1))

    def _scale(self, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        """Standard deviation and mean of a tensor's values."""
        owner, _, part = name.rpartition(".")
        if part == "scales":
            inputs = self.config.ffn_size if owner.endswith("mlp.c_proj") else self.config.hidden_size
            mean = self._weight_scale(owner, inputs) / _LEVELS_STD
            return 0.1 * mean, mean
        if len(shape) == 1:
            if part == "weight":
                return 0.1, 1.0  # of a norm
            return (0.1 if owner.endswith("c_attn") else 0.02 if name.startswith(VISUAL) else 0.0), 0.0
        if owner.endswith(("wte", "attn_pool")) and not part.startswith("in_proj"):
            return 1.0, 0.0
        if part == "positional_embedding":
            return 0.1, 0.0
        return self._weight_scale(owner, shape[0] if part == "proj" else math.prod(shape[1:])), 0.0

    def _weight_scale(self, owner: str, inputs: int) -> float:
        """1 / sqrt(inputs) keeps the variance; all additions to a residual together have a variance of one."""
        layers = self.config.visual.layers if owner.startswith(VISUAL) else self.config.num_hidden_layers
        return (inputs * (2 * layers if owner.endswith(_RESIDUAL) else 1)) ** -0.5

    def _with_outliers(self, name: str, values: Tensor, start: int) -> Tensor:
        """Enlarge the rows (of scales and embeddings: columns) that write to the residual's outlier channels."""
        owner, _, part = name.rpartition(".")
        columns = part == "scales" or owner.endswith("wte")
        if owner.endswith(("wte", *_RESIDUAL)) and values.ndim == 2:
            outlier = self._outlier[self.config.visual.width if name.startswith(VISUAL) else self.config.hidden_size]
            if columns:
                values[:, outlier] *= _OUTLIER_SCALE
            else:
                values[outlier[(outlier >= start) & (outlier < start + len(values))] - start] *= _OUTLIER_SCALE
        return values


def layout_of(config: Config) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every tensor: float16 and int32 if quantized, else torch_dtype."""
    floating = getattr(torch, "float16" if config.quantization else config.torch_dtype)
    return {
        name: (torch.int32 if name.rpartition(".")[2] in _INTEGERS else floating, shape)
        for name, shape in expected_tensors(config).items()
    }


def split_layout(layout: Layout) -> list[dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """The layouts of files of at most SHARD_BYTES each."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    for name, entry in layout.items():
        if shards[-1] and layout_bytes(shards[-1] | {name: entry}) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = entry
    return shards


def write_vocabulary(path: Path, ranks: int) -> None:
    """A qwen.tiktoken of `ranks` entries: the first 4,096 published ones, then byte strings that are not UTF-8."""
    known = (SMALL_MODEL / VOCAB_FILE).read_bytes().splitlines(keepends=True)[:ranks]
    filler = (b"\xff" + rank.to_bytes(3, "big") for rank in range(len(known), ranks))  # 0xff never occurs in UTF-8
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(filler, len(known)))
    path.write_bytes(b"".join([*known, *lines]))


def write_synthetic(
    folder: Path,
    settings: dict[str, Any],
    *,
    int4: bool,
    seed: int = 0,
    tokenizer: Path | None = None,
) -> None:
    """Write a checkpoint of `settings` (a config.json); `folder` appears once complete.

    CheckpointError if it exists, or if `tokenizer` has another size; BundleError if the disk is full.
    """
    settings = settings | ({"torch_dtype": "float16", "quantization_config": QUANTIZATION} if int4 else {})
    config = Config.from_dict(settings)
    ranks = config.visual.image_start_id + 3 - len(SPECIALS)  # <img>, </img>, <imgpad> are the last special tokens
    if tokenizer is not None and (found := Tokenizer.from_file(tokenizer).vocab_size - len(SPECIALS)) != ranks:
        raise CheckpointError(f"{tokenizer} has {found} ranks, image_start_id needs {ranks}; give the model's own")
    partial = folder.with_name(f"{folder.name}.partial")
    for taken in (folder, partial):
        if taken.exists():
            raise CheckpointError(f"{taken} already exists; remove it, or give another folder")
    layout, values = layout_of(config), Values(config, seed)
    total = layout_bytes(layout)
    check_free_space(folder.absolute().parent, total)
    try:
        partial.mkdir()
        shards = split_layout(layout)
        weight_map: dict[str, str] = {}
        with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:

            def pieces(name: str) -> Iterator[Tensor]:
                for piece in values.pieces(name, *layout[name]):
                    yield piece
                    bar.update(piece.nbytes)

            for number, shard in enumerate(shards, 1):
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                write_shard(partial / name, shard, pieces)
                weight_map |= dict.fromkeys(shard, name)
        write_json(partial / SAFETENSORS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(partial / "config.json", settings)
        write_json(partial / "generation_config.json", GENERATION)
        if int4:
            write_json(partial / "quantize_config.json", QUANTIZATION)
        if tokenizer is None:
            write_vocabulary(partial / VOCAB_FILE, ranks)
        else:
            copy_file(tokenizer, partial / VOCAB_FILE)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@exits_with_its_message("benchmarks.synthetic")
def main(arguments: list[str] | None = None) -> None:
    parser = command("synthetic", __doc__)
    parser.add_argument("folder", type=Path, metavar="OUT", help="the checkpoint's folder")
    parser.add_argument("--int4", action="store_true", help="as Qwen-VL-Chat-Int4: 9.7 GB (default: bfloat16, 19.3 GB)")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="of the decoder (default: 32)")
    parser.add_argument("--visual-layers", type=int, default=CONFIG["visual"]["layers"], help="default: 48")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="the published qwen.tiktoken, if you have it")
    args = parser.parse_args(arguments)
    settings = json.loads(json.dumps(CONFIG)) | {"num_hidden_layers": args.layers}
    settings["visual"]["layers"] = args.visual_layers
    write_synthetic(args.folder, settings, int4=args.int4, seed=args.seed, tokenizer=args.tokenizer)


if __name__ == "__main__":
    main()
