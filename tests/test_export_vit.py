"""The exported graph: what is in it, and that it computes the model."""

from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from test_vit import GOLDEN, golden_images

from export.graph import VisualWeights
from export.parity import compare, cut_stages, probe_pixels, run_graph
from export.part import data_bytes, export_vit
from export.precision import ALIGNMENT, Precision, pack_blocks
from qvl_edge.bundle import VIT, VIT_DATA
from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.vision.encoder import VisionEncoder

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # float32 in another order of sums, features up to 5
DTYPES = ("float32", "float16", "int8", "int4")


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return Checkpoint(GOLDEN / "tiny-a" / "checkpoint")


@pytest.fixture(scope="module")
def exports(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """tiny-a exported in every dtype."""
    folders = {dtype: tmp_path_factory.mktemp(dtype) for dtype in DTYPES}
    for dtype, folder in folders.items():
        export_vit(tiny, folder, dtype=dtype)
    return folders


def graph_of(folder: Path) -> onnx.GraphProto:
    return onnx.load(str(folder / VIT), load_external_data=False).graph


@pytest.mark.parametrize("name", ["tiny-a", "tiny-long"])
def test_the_float32_graph_gives_the_original_features(name: str, exports: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint(GOLDEN / name / "checkpoint")
    if name == "tiny-long":
        export_vit(checkpoint, tmp_path, dtype="float32")
    folder = exports["float32"] if name == "tiny-a" else tmp_path
    pixels, expected = golden_images(name)
    found = VisionEncoder(folder / VIT, checkpoint.config.visual).encode(pixels)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("dtype", "relative"), [("float16", 1e-3), ("int8", 2e-2), ("int4", 0.3)])
def test_narrower_graphs_stay_near_the_original_features(
    dtype: str, relative: float, exports: dict[str, Path], tiny: Checkpoint
) -> None:
    pixels, expected = golden_images("tiny-a")
    found = VisionEncoder(exports[dtype] / VIT, tiny.config.visual).encode(pixels)
    assert (found - expected).norm() / expected.norm() < relative


def test_attention_is_one_fused_node_a_block_and_one_in_the_resampler(exports: dict[str, Path]) -> None:
    for dtype, folder in exports.items():
        ops = [node.op_type for node in graph_of(folder).node]
        assert ops.count("MultiHeadAttention") == 2 + 1
        assert not {"Softmax", "Resize", "Shape", "Expand", "Loop"} & set(ops)
        products = 2 * 6 + 5  # q k v out_proj c_fc c_proj; kv_proj k v out_proj proj
        assert ops.count("MatMulNBits" if dtype.startswith("int") else "MatMul") == products


def test_the_graph_passes_the_checker_of_onnx(exports: dict[str, Path]) -> None:
    for folder in exports.values():
        onnx.checker.check_model(str(folder / VIT))


def test_batch_is_dynamic_and_everything_else_is_fixed(exports: dict[str, Path]) -> None:
    graph = graph_of(exports["float16"])
    shapes = {
        info.name: [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim]
        for info in [*graph.input, *graph.output]
    }
    assert shapes == {"pixels": ["batch", 3, 448, 448], "features": ["batch", 256, 256]}


def test_weights_lie_outside_of_the_graph_at_page_boundaries_and_do_not_overlap(exports: dict[str, Path]) -> None:
    for folder in exports.values():
        spans = []
        for tensor in graph_of(folder).initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if not entries:
                assert len(tensor.raw_data) <= 24
                continue
            assert entries["location"] == VIT_DATA
            spans.append((int(entries["offset"]), int(entries["length"])))
        ends = [offset + length for offset, length in spans]
        assert all(offset % ALIGNMENT == 0 for offset, _ in spans)
        assert all(end <= offset for end, (offset, _) in zip(ends, spans[1:], strict=False))
        assert ends[-1] <= (folder / VIT_DATA).stat().st_size


def test_size_on_disk_follows_the_dtype_and_is_foretold(exports: dict[str, Path], tiny: Checkpoint) -> None:
    sizes = {dtype: (folder / VIT_DATA).stat().st_size for dtype, folder in exports.items()}
    assert sizes["int4"] < sizes["int8"] < sizes["float16"] < sizes["float32"]
    for dtype, size in sizes.items():
        assert size <= data_bytes(tiny, Precision.of(dtype)) <= 1.5 * size


def test_rows_of_q_k_v_are_put_in_order_head_by_head(tiny: Checkpoint, exports: dict[str, Path]) -> None:
    block = "transformer.resblocks.1"
    interleaved = tiny[f"{VISUAL}{block}.attn.in_proj.weight"].float()
    model = onnx.load(str(exports["float32"] / VIT))
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for part, name in enumerate("qkv"):
        rows = [interleaved[(3 * head + part) * 104 + i] for head in range(2) for i in range(104)]
        found = torch.from_numpy(numpy_helper.to_array(stored[f"{block}.attn.{name}.weight"]).copy())
        assert torch.equal(found.T, torch.stack(rows))


def test_stages_hold_every_node_once_and_in_order(exports: dict[str, Path]) -> None:
    model = onnx.load(str(exports["int4"] / VIT), load_external_data=False)
    stages = list(cut_stages(model))
    assert len(stages) == 2 + 2
    assert [node.name for stage in stages for node in stage.graph.node] == [node.name for node in model.graph.node]


def test_stage_by_stage_gives_what_the_whole_graph_gives(exports: dict[str, Path], tiny: Checkpoint) -> None:
    pixels = probe_pixels(448)
    *_, (staged, _) = run_graph(exports["float32"] / VIT, pixels)
    whole = VisionEncoder(exports["float32"] / VIT, tiny.config.visual).encode(pixels)
    torch.testing.assert_close(staged, whole, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("bits", "block_size", "in_features"), [(4, 32, 208), (8, 128, 208), (4, 16, 96), (8, 32, 33)])
def test_packed_blocks_read_back_within_half_a_step(bits: int, block_size: int, in_features: int) -> None:
    weight = torch.randn(7, in_features, generator=torch.Generator().manual_seed(3))
    weight[2] = 0  # a dead row
    weight[3] = weight[3].abs() + 5  # far from zero on one side
    levels, scales, zeros = pack_blocks(weight, bits=bits, block_size=block_size, dtype=torch.float16)
    blocks, per_byte = -(-in_features // block_size), 8 // bits
    assert levels.shape == (7, blocks, block_size // per_byte) and scales.shape == (7, blocks)
    for n in range(7):
        for k in range(in_features):
            block, i = divmod(k, block_size)
            level = int(levels[n, block, i // per_byte]) >> (bits * (i % per_byte)) & (2**bits - 1)
            zero = int(zeros[n, block // per_byte]) >> (bits * (block % per_byte)) & (2**bits - 1)
            scale = float(scales[n, block])
            # half a step of the level, as much of the zero point, and the rounding of the scale to float16
            slack = scale if weight[n].any() else 0
            assert abs((level - zero) * scale - float(weight[n, k])) <= slack * (1 + 2**bits * 2**-11)


def test_the_tables_that_are_folded_equal_the_resampler_of_the_definition(tiny: Checkpoint) -> None:
    """(W·value + folded) is W·(value + positions) + bias, and the folded query is the projected query, in float64."""
    weights = VisualWeights(tiny, tiny.config.visual)
    prefix = f"{VISUAL}attn_pool."
    query, positions, gamma, beta, w, b = (
        tiny[prefix + name].double()
        for name in ("query", "pos_embed", "ln_q.weight", "ln_q.bias", "attn.in_proj_weight", "attn.in_proj_bias")
    )
    centred = query - query.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gamma + beta
    expected = (normed + positions) @ w[:256].T + b[:256]
    torch.testing.assert_close(weights.resampler_query().double(), expected, atol=TOLERANCE, rtol=0)
    key, table = weights.resampler_key()
    assert torch.equal(key.double(), w[256:512]) and table.shape == (1024, 256)
    # far from the edges a bicubic table of twice the size averages back to the original one within its curvature
    plain = positions @ w[256:512].T + b[256:512]
    pooled = table.double().view(16, 2, 16, 2, 256).mean((1, 3)).flatten(0, 1)
    assert (pooled - plain).norm() < 0.1 * plain.norm()


def test_comparing_reads_the_graph_from_its_own_folder_and_leaves_no_file(
    exports: dict[str, Path], tiny: Checkpoint
) -> None:
    before = set(exports["float16"].iterdir())
    parity = compare(tiny, exports["float16"] / VIT, "float16")
    assert parity.passed and [stage.stage for stage in parity.stages] == ["ln_pre", "block 0", "block 1", "features"]
    assert set(exports["float16"].iterdir()) == before
