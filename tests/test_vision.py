"""The onnxruntime vision encoder: batches, and what it refuses."""

import contextlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from test_vit import GOLDEN, golden_images

from export.part import export_vit
from qvl_edge.bundle import VIT, VIT_DATA
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import VisualConfig
from qvl_edge.errors import BundleError, ConfigError, ImageError
from qvl_edge.vision.encoder import VisionEncoder, self_test, self_test_pixels

TOLERANCE = 1e-4  # float32 in another order of sums, features up to 5


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(GOLDEN / "tiny-long" / "checkpoint")


@pytest.fixture(scope="module")
def visual(checkpoint: Checkpoint) -> VisualConfig:
    return checkpoint.config.visual


@pytest.fixture(scope="module")
def exported(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_vit(checkpoint, folder, dtype="float32")
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(exported, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_batch_is_split_and_each_image_has_the_features_that_it_has_alone(
    exported: Path, visual: VisualConfig
) -> None:
    pixels, expected = golden_images("tiny-long")
    pixels, expected = torch.cat([pixels] * 3)[:5], torch.cat([expected] * 3)[:5]
    for max_batch in (1, 2, 8):
        found = VisionEncoder(exported / VIT, visual, max_batch=max_batch).encode(pixels)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert VisionEncoder(exported / VIT, visual).encode(pixels[:0]).shape == (0, 256, 256)


def test_metadata_tells_the_source_and_the_dtype(exported: Path, visual: VisualConfig, checkpoint: Checkpoint) -> None:
    metadata = VisionEncoder(exported / VIT, visual).metadata
    assert metadata["fingerprint"] == checkpoint.fingerprint and metadata["dtype"] == "float32"


def test_pixels_of_another_shape_or_dtype_are_refused(exported: Path, visual: VisualConfig) -> None:
    encoder = VisionEncoder(exported / VIT, visual)
    for pixels in (torch.zeros(3, 448, 448), torch.zeros(1, 3, 224, 224), torch.zeros(1, 3, 448, 448).half()):
        with pytest.raises(ImageError, match=r"expected float32 of \(B, 3, 448, 448\)"):
            encoder.encode(pixels)


def test_features_that_are_not_finite_are_refused(exported: Path, visual: VisualConfig) -> None:
    with pytest.raises(ImageError, match=r"not finite"):
        VisionEncoder(exported / VIT, visual).encode(torch.full((1, 3, 448, 448), float("nan")))


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this machine has the provider")
def test_cuda_without_its_provider_is_an_error_and_not_the_cpu(exported: Path, visual: VisualConfig) -> None:
    with pytest.raises(ConfigError, match=r"has no CUDAExecutionProvider.*device='cpu'"):
        VisionEncoder(exported / VIT, visual, device="cuda")


def test_an_unknown_device_is_refused(exported: Path, visual: VisualConfig) -> None:
    with pytest.raises(ConfigError, match=r"known are cpu, cuda"):
        VisionEncoder(exported / VIT, visual, device="tpu")


@pytest.mark.parametrize("name", [VIT, VIT_DATA])
def test_a_missing_file_names_the_command_that_makes_it(name: str, folder: Path, visual: VisualConfig) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleError, match=rf"{name} is missing.*\n.*python -m export.vit CHECKPOINT {folder}"):
        VisionEncoder(folder / VIT, visual)


@pytest.mark.parametrize("name", [VIT, VIT_DATA])
def test_a_file_cut_short_is_refused(name: str, folder: Path, visual: VisualConfig) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size // 2)
    with pytest.raises(BundleError, match=r"cannot be opened"):
        VisionEncoder(folder / VIT, visual)


def test_a_data_file_that_is_a_link_out_of_the_folder_is_refused(folder: Path, visual: VisualConfig) -> None:
    (folder / VIT_DATA).rename(folder.parent / "elsewhere")
    (folder / VIT_DATA).symlink_to(folder.parent / "elsewhere")
    with pytest.raises(BundleError, match=r"outside its folder"):
        VisionEncoder(folder / VIT, visual)


def test_links_within_a_hubs_cache_are_followed_and_others_there_are_refused(
    folder: Path, visual: VisualConfig
) -> None:
    snapshot, blobs = folder.parent / "hub/snapshots/main", folder.parent / "hub/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate((VIT, VIT_DATA)):
        shutil.copyfile(folder / name, blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    pixels = torch.zeros(1, 3, visual.image_size, visual.image_size)
    found = VisionEncoder(snapshot / VIT, visual).encode(pixels)
    assert torch.equal(found, VisionEncoder(folder / VIT, visual).encode(pixels))
    (snapshot / VIT_DATA).unlink()
    (snapshot / VIT_DATA).symlink_to(folder / VIT_DATA)
    with pytest.raises(BundleError, match=r"outside its folder"):
        VisionEncoder(snapshot / VIT, visual)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_graph_that_reads_weights_from_outside_of_its_folder_is_refused(
    absolute: bool, folder: Path, visual: VisualConfig
) -> None:
    outside = folder.parent / "elsewhere"
    shutil.copyfile(folder / VIT_DATA, outside)
    model = onnx.load(str(folder / VIT), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(outside) if absolute else "../elsewhere"
    (folder / VIT).write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"cannot be opened"):
        VisionEncoder(folder / VIT, visual)


def test_the_tower_of_a_model_of_other_sizes_is_refused(exported: Path, visual: VisualConfig) -> None:
    with pytest.raises(BundleError, match=r"image_size 896.*belongs to another model"):
        VisionEncoder(exported / VIT, replace(visual, image_size=896))
    with pytest.raises(BundleError, match=r"output_dim 512.*belongs to another model"):
        VisionEncoder(exported / VIT, replace(visual, output_dim=512))


def test_the_self_test_passes_on_what_was_exported_and_fails_on_other_weights(
    folder: Path, visual: VisualConfig
) -> None:
    info = json.loads((folder / "bundle.json").read_text())["parts"]["vit"]
    assert self_test(VisionEncoder(folder / VIT, visual), info) > 1 - TOLERANCE
    tail = (folder / VIT_DATA).stat().st_size // 2
    with open(folder / VIT_DATA, "r+b") as file:
        file.seek(tail)
        file.write(bytes(tail))
    with pytest.raises(BundleError, match=r"does not give the features"):
        self_test(VisionEncoder(folder / VIT, visual), info)
    with pytest.raises(BundleError, match=r"no self_test"):
        self_test(VisionEncoder(folder / VIT, visual), {})


def test_self_test_pixels_are_a_formula_in_the_range_of_real_ones() -> None:
    pixels = self_test_pixels(56)
    assert pixels.shape == (1, 3, 56, 56) and pixels.dtype == torch.float32
    assert float(pixels[0, 0, 0, 0]) == 1.0  # sin 0 + cos 0
    assert 1.9 < float(pixels.abs().max()) <= 2.0


class FakeStream:
    """A CUDA stream as far as the encoder uses one."""

    cuda_stream = 7

    def wait_stream(self, other: "FakeStream") -> None:
        pass


class FakeSession:
    """Notes the batches that it runs, and what each is told about the arena."""

    def __init__(self) -> None:
        self.ran: list[tuple[int, str]] = []

    def io_binding(self) -> "FakeSession":
        return self

    def bind_input(self, name: str, device: str, index: int, dtype: type, shape: tuple[int, ...], address: int) -> None:
        self.batch = shape[0]

    def bind_output(self, *_: object) -> None:
        pass

    def run_with_iobinding(self, binding: object, options: ort.RunOptions) -> None:
        try:
            shrinks = options.get_run_config_entry("memory.enable_memory_arena_shrinkage")
        except RuntimeError:
            shrinks = ""
        self.ran.append((self.batch, shrinks))


@pytest.mark.parametrize("release", [False, True])
def test_on_a_card_the_arena_is_kept_and_the_largest_batch_fills_it_first(
    release: bool, exported: Path, visual: VisualConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shrinking it calls cudaFree, which waits for every running answer's step."""
    encoder = VisionEncoder(exported / VIT, visual, max_batch=3)
    session = FakeSession()
    encoder.release, encoder._session, encoder._stream = release, None, FakeStream()
    monkeypatch.setattr(encoder, "_start", lambda *_: session)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: FakeStream())
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    encoder.encode(torch.zeros(2, 3, visual.image_size, visual.image_size))
    assert session.ran == ([] if release else [(3, "")]) + [(2, "")]


def test_on_a_cpu_the_arena_is_shrunk(exported: Path, visual: VisualConfig) -> None:
    encoder = VisionEncoder(exported / VIT, visual)
    encoder._session = session = FakeSession()
    encoder.encode(torch.zeros(1, 3, visual.image_size, visual.image_size))
    assert session.ran == [(1, "cpu:0")]
