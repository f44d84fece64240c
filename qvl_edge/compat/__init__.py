"""Upstream's names over Runtime, so that the snippets of Qwen-VL's README run with the import line changed.

    from qvl_edge.compat import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, snapshot_download

A path is a folder, or the name of a model on a hub (source="hf" or "modelscope"), which is fetched. Token ids hold an
image's path as upstream writes them: its bytes inside the 256 slots. The caller of this module is the app, so
`<img>path</img>` in a string opens that file, as upstream's README uses it. Every snippet of upstream's README and
TUTORIAL, and what differs: docs/parity.md.
"""

from qvl_edge.compat.hub import snapshot_download
from qvl_edge.compat.model import AutoModelForCausalLM, AutoPeftModelForCausalLM, GenerationConfig, QWenLMHeadModel
from qvl_edge.compat.tokenizer import AutoTokenizer, BatchEncoding, QWenTokenizer

__all__ = [
    "AutoModelForCausalLM",
    "AutoPeftModelForCausalLM",
    "AutoTokenizer",
    "BatchEncoding",
    "GenerationConfig",
    "QWenLMHeadModel",
    "QWenTokenizer",
    "snapshot_download",
]
