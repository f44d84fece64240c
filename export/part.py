"""The part "vit" of a bundle: written to a temporary folder, compared with the PyTorch model, then moved into place."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx

from export.graph import OPSET, VisualWeights, build_vit
from export.parity import Parity, compare, require
from export.precision import ALIGNMENT, ExternalData, Precision
from qvl_edge.bundle import VIT, VIT_DATA, add_part, check_same_source
from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.config import IMAGE_TOKENS
from qvl_edge.errors import BundleError
from qvl_edge.files import check_free_space, replacing
from qvl_edge.model.loading import check_tensors, expected_tensors
from qvl_edge.vision.encoder import self_test_values

_WORK_PREFIX = ".vit-"
_ABANDONED = 3600  # seconds without a write: a killed export left it; a running one writes every few seconds


def export_vit(
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    dtype: str = "float16",
    block_size: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
    on_parity: Callable[[Parity], None] | None = None,
) -> Parity:
    """Export the vision tower of `checkpoint` (float or Int4: it is float in both) as the part "vit" of `folder`.

    dtype: "float16", "float32", "int8" or "int4" (see export.precision); block_size of the last two. on_parity gets the
    result before it is judged.

    `folder` is made if needed and may hold the decoder of the same model. Its files stay until the new ones have
    passed. ParityError, BundleError, CheckpointError and ConfigError leave nothing behind.
    """
    folder = Path(folder)
    visual, precision = checkpoint.config.visual, Precision.of(dtype, block_size)
    # also what this command does not read, so that work on one half is not lost to the other
    check_tensors(checkpoint, decoder=any(not name.startswith(VISUAL) for name in checkpoint.names))
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
        with replacing(work / VIT_DATA) as partial, open(partial, "wb") as file:
            source, data = VisualWeights(checkpoint, visual), ExternalData(file, VIT_DATA)
            model = build_vit(source, data, precision, metadata=metadata, progress=progress)
        _save(model, work / VIT)
        progress("comparing with the PyTorch model in float32")
        parity = compare(checkpoint, work / VIT, dtype, progress=progress)
        if precision.accuracy_level and not parity.passed:
            progress("int8 activations on the CPU lose too much with these weights; comparing with float16 ones")
            precision = replace(precision, accuracy_level=0)
            for node in model.graph.node:  # the weights are the same at any level
                for attribute in node.attribute:
                    if attribute.name == "accuracy_level":
                        attribute.i = precision.accuracy_level
            _save(model, work / VIT)
            parity = compare(checkpoint, work / VIT, dtype, progress=progress)
        if on_parity:
            on_parity(parity)
        require(parity)
        # Without its graph a data file is unused: stopped between these lines, the bundle names the command to run.
        (folder / VIT).unlink(missing_ok=True)
        for name in (VIT_DATA, VIT):
            (work / name).replace(folder / name)
    info = {"dtype": dtype, "opset": OPSET, "parity": parity.summary()}
    if precision.block_size is not None:
        info |= {"block_size": precision.block_size, "accuracy_level": precision.accuracy_level}
    info["self_test"] = self_test_values(parity.self_test_features)
    add_part(folder, "vit", [VIT, VIT_DATA], fingerprint=fingerprint, info=info)
    return parity


def _save(model: onnx.ModelProto, path: Path) -> None:
    with replacing(path) as partial:
        partial.write_bytes(model.SerializeToString(deterministic=True))


def data_bytes(checkpoint: Checkpoint, precision: Precision) -> int:
    """Upper bound for the bytes of vit.onnx.data, some percent too high."""
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
    """A temporary folder inside `folder`, which is made, and removed again on error if it is empty."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_WORK_PREFIX}*"):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
        temporary = tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise BundleError(f"{folder} cannot be written to: {error.strerror or error}; choose another folder") from None
    try:
        with temporary as work:
            yield Path(work)
    except BaseException:
        if made and not os.listdir(folder):
            folder.rmdir()
        raise
