"""What the vision tower takes of memory, by formula: its session, and the encoding of some images.

CPU: measured with onnxruntime 1.32 on x86-64 under the options of engine.vision, as growth of VmRSS and VmHWM; towers
of 2 layers whose widths were varied one by one gave the factors below. At full size, for one image, in MB:
    int8     2,383 by formula, 2,383 and 2,393 measured     three images 2,719 and 2,748
    float16  4,062 by formula, 4,110 and 4,120 measured     three images 4,298 and 4,388
    int4     1,569 by formula, 1,554 and 1,577 measured     three images 1,905 and 2,098
OpenVINO: VmRSS with 2026.4, whose reader copies packed weights and whose file stays mapped; one image at a time. At
full size int8 6,242 by formula, 6,169 and 6,221 MB measured; the other dtypes from towers of 4 blocks.
CUDA: calculated from the graph's tensors and not measured.
"""

from qvl_edge.config import IMAGE_TOKENS, VisualConfig

# Bytes of a weight of a matrix product. On the CPU float32 and float16 are mapped from the file. An int8 weight is
# repacked, with 16 bytes beside each block of 128; an int4 one with 6.4 beside each 32.
# On CUDA all are as in the file, with a float16 scale and a zero point.
_WEIGHT = {
    "cpu": {"float32": 4.0, "float16": 2.0, "int8": 1 + 16 / 128, "int4": 0.5 + 6.4 / 32},
    "openvino": {"float32": 8.1, "float16": 8.1, "int8": 3.2, "int4": 2.1},
    "cuda": {"float32": 4.0, "float16": 2.0, "int8": 1 + 3 / 128, "int4": 0.5 + 2.5 / 32},
}
_OPENVINO = 80_000_000  # its libraries, and what is no weight of a matrix product
_SESSION = 25_000_000  # the graph, and code of onnxruntime that nothing else has paged in
_CUBLAS = 32 << 20  # workspace that cuBLAS asks for at most
# Rows of MLP width that are alive at once on the CPU, in units of float32; float16 tensors and copies included
_MLP_ROWS = {"float32": 2.0, "float16": 2.5, "int8": 4.0, "int4": 4.0}


def parameters(visual: VisualConfig) -> int:
    """Weights of the graph's matrix products; the resampler's queries are projected at export."""
    width, hidden = visual.width, visual.output_dim
    block = 4 * width * width + 2 * width * visual.mlp_width
    return visual.layers * block + (width * hidden if width != hidden else 0) + 4 * hidden * hidden


def session_bytes(visual: VisualConfig, dtype: str, device_type: str) -> int:
    """A session that has encoded an image: until then the CPU has not read what is mapped."""
    if device_type == "openvino":
        return int(parameters(visual) * _WEIGHT[device_type][dtype]) + _OPENVINO
    # convolution and patch positions are float32 in every graph; the rest is as the activations, which the CPU widens
    stem = (3 * visual.patch_size**2 + visual.patches) * visual.width
    tables = (visual.patches + IMAGE_TOKENS) * visual.output_dim
    tables += visual.layers * (9 * visual.width + visual.mlp_width)
    narrow = dtype == "float16" or (device_type == "cuda" and dtype != "float32")
    weights = parameters(visual) * _WEIGHT[device_type][dtype]
    return int(weights) + 4 * stem + (2 if narrow else 4) * tables + _SESSION


def workspace_bytes(visual: VisualConfig, dtype: str, batch: int, device_type: str) -> int:
    """What encoding `batch` images at once takes beside the session; on a CPU it is given back afterwards."""
    if device_type == "openvino":
        dtype, batch, device_type = "float32", 1, "cpu"
    width, mlp_width, hidden = visual.width, visual.mlp_width, visual.output_dim
    largest = max(width * mlp_width, hidden * hidden)
    if device_type == "cpu":
        row = 4 * max(_MLP_ROWS[dtype] * mlp_width + 5 * width, 11 * width, 6 * hidden)
        widened = 4 * largest if dtype == "float16" else 0  # one weight at a time is turned into float32
        return int(batch * visual.patches * row) + widened
    size = 4 if dtype == "float32" else 2
    # the residual in float32, and a product with its sum with the bias; or q, k, v with what is made of them; or the
    # resampler's normed rows in both dtypes, keys and values
    row = max(4 * width + size * (2 * mlp_width + width), 4 * width + size * 8 * width, (4 + 5 * size) * hidden)
    dequantized = 2 * largest if dtype.startswith("int") else 0
    return batch * visual.patches * row + dequantized + _CUBLAS
