"""The vision tower in torch against features that the original code computed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qvl_edge.checkpoint import Checkpoint
from qvl_edge.model.loading import load_visual
from qvl_edge.model.vit import VisionTransformer, interpolate_positions
from qvl_edge.vision.image import load_image, to_pixels

GOLDEN = Path(__file__).parent / "data" / "golden"
TOLERANCE = 1e-4  # float32 on two builds of torch, features up to 5


def golden_images(name: str) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, S, S) of every golden image of a checkpoint, and the original's features (B, 256, hidden)."""
    folder = GOLDEN / name
    stored = np.load(folder / "golden.npz")
    names = sorted(key.removeprefix("vision/") for key in stored.files if key.startswith("vision/"))
    pixels = to_pixels([load_image(folder / "images" / image, background="none") for image in names], 448)
    return pixels, torch.from_numpy(np.stack([stored[f"vision/{image}"] for image in names]))


@pytest.fixture(scope="module")
def tower() -> VisionTransformer:
    return load_visual(Checkpoint(GOLDEN / "tiny-a" / "checkpoint"), dtype=torch.float32)


@pytest.mark.parametrize("name", ["tiny-a", "tiny-long"])
@torch.inference_mode()
def test_features_are_those_of_the_original(name: str) -> None:
    pixels, expected = golden_images(name)
    found = load_visual(Checkpoint(GOLDEN / name / "checkpoint"), dtype=torch.float32)(pixels)
    assert len(found) >= 1 and found.std() > 0.5
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_attention_is_a_loop_over_heads_with_interleaved_rows(tower: VisionTransformer) -> None:
    attention = tower.transformer.resblocks[0].attn
    x = torch.randn(1, 5, 208, generator=torch.Generator().manual_seed(1))
    weight, bias = attention.in_proj.weight.double(), attention.in_proj.bias.double()
    heads = []
    for head in range(2):
        rows = [slice((3 * head + part) * 104, (3 * head + part + 1) * 104) for part in range(3)]
        q, k, v = (x[0].double() @ weight[row].T + bias[row] for row in rows)
        heads.append((q @ k.T / 104**0.5).softmax(-1) @ v)
    expected = torch.cat(heads, -1) @ attention.out_proj.weight.double().T + attention.out_proj.bias.double()
    torch.testing.assert_close(attention(x)[0].double(), expected, atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_an_image_in_a_batch_has_the_features_that_it_has_alone(tower: VisionTransformer) -> None:
    pixels, _ = golden_images("tiny-a")
    torch.testing.assert_close(tower(pixels)[1:2], tower(pixels[1:2]), atol=TOLERANCE, rtol=0)


def bicubic_weights(source: int, target: int) -> Tensor:
    """(target, source) float64: Keys' kernel with a = -0.75 at half-pixel centres, edges repeated."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x < 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    weights = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        for tap in range(int(centre // 1) - 1, int(centre // 1) + 3):
            weights[i, min(max(tap, 0), source - 1)] += kernel(centre - tap)
    return weights


def test_position_tables_are_resized_by_the_bicubic_formula_or_left_alone() -> None:
    table = torch.randn(256, 3, generator=torch.Generator().manual_seed(2))
    assert interpolate_positions(table, 256) is table
    weights, grid = bicubic_weights(16, 32), table.double().view(16, 16, 3)
    expected = torch.einsum("yi,xj,ijc->yxc", weights, weights, grid).flatten(0, 1)
    torch.testing.assert_close(interpolate_positions(table, 1024).double(), expected, atol=TOLERANCE, rtol=0)
