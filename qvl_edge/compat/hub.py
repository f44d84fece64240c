"""ModelScope's way to a model's folder."""

from typing import Any

from qvl_edge.compat.arguments import refuse_unknown
from qvl_edge.hub import local_folder
from qvl_edge.options import Source


def snapshot_download(
    model_id: str,
    revision: str | None = None,
    *,
    source: Source = "modelscope",
    local_files_only: bool = False,
    **options: Any,
) -> str:
    """The folder of a hub's model, fetched if need be: ModelScope's name, whose hub upstream's README takes it from."""
    refuse_unknown(options)
    return str(local_folder(model_id, source=source, revision=revision, local_files_only=local_files_only))
