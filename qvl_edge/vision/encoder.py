"""The vision encoder: an exported vit.onnx in onnxruntime or OpenVINO, pixels to image features."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from kernels.sessions import session_options
from qvl_edge.bundle import VIT_DATA
from qvl_edge.config import IMAGE_TOKENS, VisualConfig
from qvl_edge.errors import BundleError, ConfigError, ImageError
from qvl_edge.memory import trim_heap
from qvl_edge.vision.cuda_versions import cuda_mismatch
from qvl_edge.vision.openvino import NAME as OPENVINO
from qvl_edge.vision.openvino import OpenVinoTower, check_openvino

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_AGAIN = "make it again with:\n  python -m export.vit CHECKPOINT {folder}"
_SELF_TEST_GRID = (4, 8)  # feature rows and columns, evenly spread: enough to tell a broken encoder
_SELF_TEST_COSINE = 0.999  # the same weights on another machine: float16 rounds in another order


class VisionEncoder:
    """A session over vit.onnx. `metadata` holds what the export wrote: fingerprint, dtype and sizes."""

    def __init__(
        self,
        path: str | Path,
        visual: VisualConfig,
        *,
        device: str = "cpu",
        max_batch: int = 4,
        release: bool = False,
    ):
        """Open `path`; its data file must lie beside it.

        device: "cpu", "cuda", "cuda:N", or "openvino", which is a CPU too; nothing else is used in its place.
        max_batch: images that are encoded at once; more are split. release: have the session in memory only while
        images are encoded; each `encode` opens it anew.
        ConfigError if the device cannot be used; BundleError if the file is missing, damaged, reaches out of its
        folder, or belongs to another model.
        """
        self.path, self.visual, self.max_batch, self.release = Path(path), visual, max_batch, release
        if max_batch < 1:
            raise ConfigError(f"max_batch is {max_batch}, it has to be at least 1")
        self._openvino = device == OPENVINO
        if self._openvino:
            check_openvino()
        kind, _, index = ("cpu" if self._openvino else device).partition(":")
        if kind not in PROVIDERS or (index and not index.isdigit()):
            raise ConfigError(f"device is {device!r}, known are {', '.join(PROVIDERS)}, cuda:N and {OPENVINO}")
        provider = PROVIDERS[kind]
        if provider not in ort.get_available_providers():
            raise ConfigError(
                f"onnxruntime {ort.__version__} has no {provider} (it has {', '.join(ort.get_available_providers())}); "
                "install it with: pip uninstall onnxruntime; pip install 'qvl-edge[cuda]'. Or use device='cpu'"
            )
        self.device = torch.device(kind, int(index or 0))
        if kind == "cuda" and self.device.index >= torch.cuda.device_count():
            raise ConfigError(
                f"device is {device!r}, but torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices; "
                "`qvl-edge doctor` says more, or use device='cpu'"
            )
        # onnxruntime takes torch's default stream, whose handle is 0, for none at all, so this is another one
        self._stream = torch.cuda.Stream(self.device) if kind == "cuda" else None
        self._session: ort.InferenceSession | OpenVinoTower | None = None
        self._check_files()
        self.metadata = self._read_metadata()
        if not release or kind == "cuda":  # whether CUDA works is known only when it is tried
            self._session = self._open()
        if release:
            self.close()

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalized pixels (B, 3, S, S) float32, anywhere -> features (B, 256, output_dim) float32 on `device`.

        ImageError if the pixels have another shape, or if the features are not finite.
        """
        size = self.visual.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size) or pixels.dtype != torch.float32:
            raise ImageError(
                f"pixels are {pixels.dtype} of shape {tuple(pixels.shape)}; expected float32 of (B, 3, {size}, {size})"
            )
        shape = (len(pixels), IMAGE_TOKENS, self.visual.output_dim)
        features = torch.empty(shape, dtype=torch.float32, device=self.device)
        if not len(pixels):
            return features
        if self._session is None:
            self._session = self._open()
        try:
            for part, found in zip(pixels.split(self.max_batch), features.split(self.max_batch), strict=True):
                self._run(self._session, part, found)
        finally:
            if self.release:
                self.close()
            else:
                trim_heap()
        if not torch.isfinite(features).all():
            raise ImageError(
                f"the {self.metadata.get('dtype', '')} vision tower gave features that are not finite; "
                "export it again with --dtype float32, or check that the pixels are finite"
            )
        return features

    def close(self) -> None:
        """Give back the session's memory. The next `encode` opens it again."""
        self._session = None
        trim_heap()

    def _run(self, session: ort.InferenceSession | OpenVinoTower, pixels: Tensor, features: Tensor) -> None:
        """Encode one batch into `features`, contiguous on `device`; the session reads and writes torch's memory."""
        if isinstance(session, OpenVinoTower):
            session.run(pixels.cpu(), features)
            return
        binding, options = session.io_binding(), ort.RunOptions()
        if self._stream is None:
            # or the arena keeps what the largest batch has taken
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
            pixels = pixels.to(self.device).contiguous()
            _bind(binding, pixels, features)
            session.run_with_iobinding(binding, options)
            return
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            pixels = pixels.to(self.device).contiguous()
            _bind(binding, pixels, features)
            session.run_with_iobinding(binding, options)
        current.wait_stream(self._stream)

    def _check_files(self) -> None:
        folder = self.path.parent.absolute()
        allowed = {folder.resolve()}
        if folder.parent.name == "snapshots":  # of a hub's cache, whose links lead there
            allowed.add((folder.parent.parent / "blobs").resolve())
        again = _AGAIN.format(folder=self.path.parent)
        for file in (self.path, self.path.with_name(VIT_DATA)):
            if not file.is_file():
                raise BundleError(f"{file} is missing; copy it, or {again}")
            if file.resolve().parent not in allowed:
                raise BundleError(
                    f"{file} is a link to {file.resolve()}, outside its folder; put the file itself there, or {again}"
                )

    def _read_metadata(self) -> dict[str, str]:
        """The graph's metadata, once its sizes have been compared with config.json; weights are mapped, not read."""
        session = self._start("CPUExecutionProvider", {}, _unoptimized())
        self._check_sizes(session)
        return dict(session.get_modelmeta().custom_metadata_map)

    def _open(self) -> ort.InferenceSession | OpenVinoTower:
        if self._openvino:
            try:
                return OpenVinoTower(self.path, self.metadata.get("dtype", ""), self.visual.image_size)
            except RuntimeError as error:
                raise self._unreadable(error) from None
        if self._stream is None:
            return self._start("CPUExecutionProvider", {}, cpu_options(self.metadata.get("dtype")))
        torch.cuda.empty_cache()  # what torch keeps for later is of no use to onnxruntime
        options = session_options()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        settings = _CUDA | {"device_id": str(self.device.index), "user_compute_stream": str(self._stream.cuda_stream)}
        with torch.cuda.device(self.device):  # onnxruntime makes its own device the current one
            session = self._start("CUDAExecutionProvider", settings, options)
        if not self.release:
            # The arena keeps what a batch takes: giving it back after each picture would call cudaFree, which stops the
            # steps of running answers. The largest batch comes first, so that the others fit into its chunks.
            size = self.visual.image_size
            pixels = torch.zeros(self.max_batch, 3, size, size)
            features = torch.empty(self.max_batch, IMAGE_TOKENS, self.visual.output_dim, device=self.device)
            self._run(session, pixels, features)
        return session

    def _start(self, provider: str, settings: dict[str, str], options: ort.SessionOptions) -> ort.InferenceSession:
        try:
            # also refuses external data that would be read from outside of the folder
            session = ort.InferenceSession(str(self.path), options, providers=[(provider, settings)])
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise self._unreadable(error) from None
        # a provider whose libraries do not load is replaced by the CPU with no more than a warning
        if provider not in session.get_providers():
            raise ConfigError(
                f"{provider} did not start and onnxruntime took {', '.join(session.get_providers())} instead: "
                + (
                    cuda_mismatch(ort.__version__, torch.version.cuda)
                    or "its CUDA or cuDNN libraries were not found; `qvl-edge doctor` says more, or use device='cpu'"
                )
            )
        return session

    def _unreadable(self, error: Exception) -> BundleError:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        where = OPENVINO if self._openvino else self.device
        again = _AGAIN.format(folder=self.path.parent)
        return BundleError(f"{self.path} cannot be opened on {where}: {reason}; {again}")

    def _check_sizes(self, session: ort.InferenceSession) -> None:
        size, width = self.visual.image_size, self.visual.output_dim
        shapes = {info.name: info.shape for info in [*session.get_inputs(), *session.get_outputs()]}
        found = {name: shape[1:] for name, shape in shapes.items()}
        expected = {"pixels": [3, size, size], "features": [IMAGE_TOKENS, width]}
        if found != expected:
            raise BundleError(
                f"{self.path} has {found}, config.json asks for {expected} (image_size {size}, output_dim {width}); it "
                f"belongs to another model, {_AGAIN.format(folder=self.path.parent)}"
            )


_CUDA = {
    "arena_extend_strategy": "kSameAsRequested",  # by default the arena doubles whenever it grows
    "cudnn_conv_algo_search": "HEURISTIC",  # by default every convolution is tried out, with large workspaces
    "cudnn_conv_use_max_workspace": "0",
}


def _bind(binding: ort.IOBinding, pixels: Tensor, features: Tensor) -> None:
    for bind, name, tensor in (
        (binding.bind_input, "pixels", pixels),
        (binding.bind_output, "features", features),
    ):
        device = tensor.device
        bind(name, device.type, device.index or 0, np.float32, tuple(tensor.shape), tensor.data_ptr())


def _unoptimized() -> ort.SessionOptions:
    """Of a session that maps its weights and makes nothing of them."""
    options = session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def cpu_options(dtype: str | None) -> ort.SessionOptions:
    """Of a session on the CPU over a graph of this dtype.

    Four blocks and the resampler at full width, onnxruntime 1.32 on x86-64 (MiB in memory; CPU seconds an image):
      float16, 454 MiB on disk: by default every weight becomes a float32 constant at load, 1,050 MiB and 2.3 s. Without
      optimizer the file stays mapped and a product widens its weight when it runs, 500 MiB and 2.4 s; by priority,
      because in the default order all weights are widened before the first product.
      float32, 898 MiB: packed for the products 1,030 MiB and 2.3 s; as mapped the same and 2.3 to 2.6 s, open at once.
      int8, int4: have to be packed, so the optimizer has to make float32 constants of their scales first. (Without it
      int8 activations give wrong numbers: a cosine of 0.06.)
    The arena, shrunk after each run, saves a sixth of the time against malloc, and a fifth of the peak of four images;
    buffers that wait for reuse cost more than they save.
    """
    if dtype in ("float32", "float16"):
        options = _unoptimized()
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    else:
        options = session_options()
    options.enable_mem_pattern = False
    options.enable_mem_reuse = False
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
