"""The vision encoder: an exported vit.onnx in onnxruntime, pixels to image features."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from qvl_edge.bundle import VIT_DATA
from qvl_edge.config import IMAGE_TOKENS, VisualConfig
from qvl_edge.errors import BundleError, ConfigError, ImageError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_AGAIN = "make it again with:\n  python -m export.vit CHECKPOINT {folder}"
_ERRORS_ONLY = 3  # onnxruntime's log severity: its warnings about float16 on a CPU are of no use to a caller
_SELF_TEST_GRID = (4, 8)  # feature rows and columns, evenly spread: enough to tell a broken encoder
_SELF_TEST_COSINE = 0.999  # the same weights on another machine: float16 rounds in another order


class VisionEncoder:
    """An onnxruntime session over vit.onnx. `metadata` holds what the export wrote: fingerprint, dtype and sizes."""

    def __init__(
        self,
        path: str | Path,
        visual: VisualConfig,
        *,
        device: str = "cpu",
        threads: int | None = None,
        max_batch: int = 4,
    ):
        """Open `path`; its data file must lie beside it.

        device: "cpu", "cuda" or "cuda:N", and nothing else is used in its place. threads: of a CPU session (default:
        all cores).
        max_batch: images that are encoded at once; more are split. ConfigError if the device cannot be used;
        BundleError if the file is missing, damaged, reaches out of its folder, or belongs to another model.
        """
        self.path, self.visual, self.max_batch = Path(path), visual, max_batch
        if max_batch < 1 or (threads is not None and threads < 1):
            raise ConfigError(f"max_batch is {max_batch} and threads is {threads}; both have to be at least 1")
        kind, _, index = device.partition(":")
        if kind not in PROVIDERS or (index and not index.isdigit()):
            raise ConfigError(f"device is {device!r}, known are {', '.join(PROVIDERS)} and cuda:N")
        provider = PROVIDERS[kind]
        if provider not in ort.get_available_providers():
            raise ConfigError(
                f"onnxruntime {ort.__version__} has no {provider} (it has {', '.join(ort.get_available_providers())}); "
                "install it with: pip uninstall onnxruntime; pip install 'qvl-edge[cuda]'. Or use device='cpu'"
            )
        self._check_files()
        self._session = self._open(provider, _options(provider, threads), device)
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self._check_sizes()

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalized pixels (B, 3, S, S) float32 -> features (B, 256, output_dim) float32 on the CPU.

        ImageError if the pixels have another shape, or if the features are not finite.
        """
        size = self.visual.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size) or pixels.dtype != torch.float32:
            raise ImageError(
                f"pixels are {pixels.dtype} of shape {tuple(pixels.shape)}; expected float32 of (B, 3, {size}, {size})"
            )
        found = [self._run(part) for part in pixels.split(self.max_batch) if len(part)]
        return torch.cat(found) if found else torch.empty(0, IMAGE_TOKENS, self.visual.output_dim)

    def _run(self, pixels: Tensor) -> Tensor:
        (array,) = self._session.run(["features"], {"pixels": pixels.cpu().contiguous().numpy()})
        features = torch.from_numpy(array)
        if not torch.isfinite(features).all():
            raise ImageError(
                f"the {self.metadata.get('dtype', '')} vision tower gave features that are not finite; "
                "export it again with --dtype float32, or check that the pixels are finite"
            )
        return features

    def _check_files(self) -> None:
        folder = self.path.parent.resolve()
        again = _AGAIN.format(folder=self.path.parent)
        for file in (self.path, self.path.with_name(VIT_DATA)):
            if not file.is_file():
                raise BundleError(f"{file} is missing; copy it, or {again}")
            if file.resolve().parent != folder:
                raise BundleError(
                    f"{file} is a link to {file.resolve()}, outside its folder; put the file itself there, or {again}"
                )

    def _open(self, provider: str, options: ort.SessionOptions, device: str) -> ort.InferenceSession:
        try:
            # also refuses external data that would be read from outside of the folder
            settings = _PROVIDER_OPTIONS[provider]
            if index := device.partition(":")[2]:
                settings = settings | {"device_id": index}
            session = ort.InferenceSession(str(self.path), options, providers=[(provider, settings)])
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            again = _AGAIN.format(folder=self.path.parent)
            raise BundleError(f"{self.path} cannot be opened on {device}: {reason}; {again}") from None
        # a provider whose libraries do not load is replaced by the CPU with no more than a warning
        if provider not in session.get_providers():
            raise ConfigError(
                f"{provider} did not start and onnxruntime took {', '.join(session.get_providers())} instead: its CUDA "
                f"or cuDNN libraries were not found. onnxruntime {ort.__version__} and torch {torch.__version__} have "
                "to be built for one CUDA version; install both anew, or use device='cpu'"
            )
        return session

    def _check_sizes(self) -> None:
        size, width = self.visual.image_size, self.visual.output_dim
        shapes = {info.name: info.shape for info in [*self._session.get_inputs(), *self._session.get_outputs()]}
        found = {name: shape[1:] for name, shape in shapes.items()}
        expected = {"pixels": [3, size, size], "features": [IMAGE_TOKENS, width]}
        if found != expected:
            raise BundleError(
                f"{self.path} has {found}, config.json asks for {expected} (image_size {size}, output_dim {width}); it "
                f"belongs to another model, {_AGAIN.format(folder=self.path.parent)}"
            )


_PROVIDER_OPTIONS: dict[str, dict[str, str]] = {
    "CPUExecutionProvider": {},
    # by default the arena doubles whenever it grows, and cuDNN tries out every convolution with large workspaces
    "CUDAExecutionProvider": {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"},
}


def _options(provider: str, threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    if provider != "CPUExecutionProvider":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def self_test_pixels(image_size: int) -> Tensor:
    """An image of waves, (1, 3, S, S) float32 within ±2: a formula, so that it is the same everywhere."""
    turn = 2 * math.pi * torch.arange(image_size, dtype=torch.float64) / image_size
    waves = [torch.sin((2 + channel) * turn)[:, None] + torch.cos((3 - channel) * turn) for channel in range(3)]
    return torch.stack(waves)[None].float()


def self_test_values(features: Tensor) -> list[list[float]]:
    """A few of the features (256, output_dim) of `self_test_pixels`, to be kept in the manifest."""
    rows, columns = (size // count for size, count in zip(features.shape, _SELF_TEST_GRID, strict=True))
    return [[float(f"{value:.6g}") for value in row] for row in features[::rows, ::columns].tolist()]


def self_test(encoder: VisionEncoder, info: Mapping[str, Any]) -> float:
    """Encode `self_test_pixels` and compare with the manifest's entry of the part "vit".

    Returns the cosine with what the export saw. BundleError if it is below 0.999 or the entry has no self-test.
    """
    if "self_test" not in info:
        again = _AGAIN.format(folder=encoder.path.parent)
        raise BundleError(f"the manifest beside {encoder.path} has no self_test; {again}")
    found = torch.tensor(self_test_values(encoder.encode(self_test_pixels(encoder.visual.image_size))[0])).flatten()
    expected = torch.tensor(info["self_test"]).flatten()
    same_size = found.shape == expected.shape
    cosine = float(torch.cosine_similarity(found, expected, dim=0)) if same_size else 0.0
    if not cosine >= _SELF_TEST_COSINE:
        raise BundleError(
            f"{encoder.path} does not give the features that it gave when it was exported (cosine {cosine:.4f}, at "
            f"least {_SELF_TEST_COSINE} is expected); {_AGAIN.format(folder=encoder.path.parent)}"
        )
    return cosine
