"""The part "vit" of a bundle: written into a work folder, compared with the definition, then put in place."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx

from export.external import ALIGNMENT, ExternalData
from export.graph import OPSET, build_vit
from export.parity import Parity, compare, require
from export.precision import Precision
from export.weights import TensorSource, VisualWeights
from qvl_edge.bundle import VIT, VIT_DATA, add_part, check_same_source
from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.config import IMAGE_TOKENS, VisualConfig
from qvl_edge.errors import BundleError
from qvl_edge.files import check_free_space, replacing
from qvl_edge.model.loading import check_tensors, expected_tensors
from qvl_edge.vision.encoder import self_test_values

Progress = Callable[[str], None]
WORK_PREFIX = ".vit-"
_ABANDONED = 3600  # seconds without a write: a killed export left it; a running one writes every few seconds


def export_vit(
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    dtype: str = "float16",
    block_size: int | None = None,
    progress: Progress | None = None,
    on_parity: Callable[[Parity], None] | None = None,
    weights: TensorSource | None = None,
) -> Parity:
    """Export the vision tower of `checkpoint` (float or Int4: it is float in both) as the part "vit" of `folder`.

    dtype: "float16", "float32", "int8" or "int4" (see export.precision); block_size of the last two. on_parity gets the
    outcome before it is judged. weights: what the graph is made of, if not the checkpoint's own tensors, under the
    same names; it is compared with the checkpoint all the same.

    `folder` is made if needed and may hold the decoder of the same model. What is there stays until the new files have
    passed. ParityError, BundleError, CheckpointError and ConfigError leave nothing behind.
    """
    folder, say = Path(folder), progress or (lambda _: None)
    visual, precision = checkpoint.config.visual, Precision.of(dtype, block_size)
    check_tensors(checkpoint, decoder=False)
    if folder.exists() and folder.resolve() == checkpoint.path.resolve():
        raise BundleError(f"{folder} is the checkpoint itself; give another folder for the bundle")
    fingerprint = checkpoint.fingerprint
    check_same_source(folder, "vit", fingerprint)
    with _work_folder(folder) as work:
        check_free_space(folder, data_bytes(checkpoint, precision))
        metadata = {
            "fingerprint": fingerprint,
            "dtype": dtype,
            "image_size": str(visual.image_size),
            "patch_size": str(visual.patch_size),
            "output_dim": str(visual.output_dim),
        }
        _write(work, visual, weights or checkpoint, precision, metadata, say)
        say("comparing with the definition in float32")
        parity = compare(checkpoint, visual, work / VIT, dtype, progress=say)
        if precision.accuracy_level and not parity.passed:
            say("int8 activations on the CPU lose too much with these weights; comparing with float16 ones")
            precision = replace(precision, accuracy_level=0)
            _set_accuracy_level(work / VIT, 0)
            parity = compare(checkpoint, visual, work / VIT, dtype, progress=say)
        if on_parity:
            on_parity(parity)
        require(parity)
        # Without its graph a data file is not used: stopped between these lines, the bundle names the command to run.
        (folder / VIT).unlink(missing_ok=True)
        for name in (VIT_DATA, VIT):
            (work / name).replace(folder / name)
    info = {"dtype": dtype, "opset": OPSET, "parity": parity.summary()}
    if precision.block_size is not None:
        info |= {"block_size": precision.block_size, "accuracy_level": precision.accuracy_level}
    info["self_test"] = self_test_values(parity.self_test_features)
    add_part(folder, "vit", [VIT, VIT_DATA], fingerprint=fingerprint, info=info)
    return parity


def _write(
    work: Path,
    visual: VisualConfig,
    source: TensorSource,
    precision: Precision,
    metadata: dict[str, str],
    progress: Progress,
) -> None:
    with replacing(work / VIT_DATA) as partial, open(partial, "wb") as file:
        model = build_vit(
            visual,
            VisualWeights(source, visual),
            ExternalData(file, VIT_DATA),
            precision,
            metadata=metadata,
            progress=progress,
        )
    with replacing(work / VIT) as partial:
        partial.write_bytes(model.SerializeToString(deterministic=True))


def _set_accuracy_level(path: Path, level: int) -> None:
    """Of every MatMulNBits of the graph at `path`; its weights are the same at any level."""
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    with replacing(path) as partial:
        partial.write_bytes(model.SerializeToString(deterministic=True))


def data_bytes(checkpoint: Checkpoint, precision: Precision) -> int:
    """Bytes that vit.onnx.data takes at most; some percent too many."""
    visual = checkpoint.config.visual
    shapes = expected_tensors(checkpoint.config, decoder=False)
    products = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    for table in ("positional_embedding", "attn_pool.query", "attn_pool.pos_embed"):
        products.pop(VISUAL + table)
    stem = (3 * visual.patch_size**2 + visual.patches) * visual.width
    vectors = sum(shape[0] for shape in shapes.values() if len(shape) == 1)
    tables = (visual.patches + IMAGE_TOKENS) * visual.output_dim
    return (
        sum(precision.product_bytes(*shape) for shape in products.values())
        + 4 * (stem + vectors)
        + precision.activations.itemsize * tables
        + 3 * ALIGNMENT * len(shapes)  # a block's 12 tensors become 28 at most, each padded to a page
    )


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder` while the context lasts; `folder` itself is made, and unmade on error."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{WORK_PREFIX}*"):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=folder))
    except OSError as error:
        raise BundleError(f"{folder} cannot be written to: {error.strerror or error}; choose another folder") from None
    try:
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        if made and not os.listdir(folder):
            folder.rmdir()
        raise
    shutil.rmtree(work, ignore_errors=True)
