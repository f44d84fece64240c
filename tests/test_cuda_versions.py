"""Which onnxruntime-gpu and torch go together, and the command that mends a pair that does not."""

import re

import pytest

from qvl_edge.vision.cuda_versions import cuda_mismatch

GOOD = [("1.22.0", "12.4"), ("1.26.1", "12.8"), ("1.27.0", "13.0"), ("1.31.1", "13.2"), ("2.0.0", "13.0")]
WITH_CUDA_12 = "pip install 'onnxruntime-gpu>=1.22,<1.27'"
WITH_CUDA_13 = "pip install 'onnxruntime-gpu>=1.27'"
BAD = [
    ("1.27.0", "12.8", WITH_CUDA_12),
    ("1.31.1", "12.1", WITH_CUDA_12),
    ("1.26.9", "13.0", WITH_CUDA_13),
    ("1.9.0", "13.0", WITH_CUDA_13),  # 9 is less than 26, as a string it is more
    ("1.27.0.dev20260301", "12.8", WITH_CUDA_12),
]


@pytest.mark.parametrize(("ort", "cuda"), GOOD)
def test_a_pair_for_one_cuda_is_no_mismatch(ort: str, cuda: str) -> None:
    assert cuda_mismatch(ort, cuda) is None


@pytest.mark.parametrize(("ort", "cuda", "command"), BAD)
def test_a_mismatch_names_both_sides_and_ends_in_the_command_that_mends_it(ort: str, cuda: str, command: str) -> None:
    said = cuda_mismatch(ort, cuda)
    assert said is not None and ort in said and f"torch for CUDA {cuda[:2]}" in said and said.endswith(command)


@pytest.mark.parametrize(("ort", "cuda", "command"), BAD)
def test_what_the_command_installs_goes_with_that_torch(ort: str, cuda: str, command: str) -> None:
    bounds = re.findall(r"(<|>=)(\d+\.\d+)", command)
    allowed = [version for relation, version in bounds if relation == ">="]
    allowed += [f"1.{int(version.split('.')[1]) - 1}" for relation, version in bounds if relation == "<"]
    assert allowed and all(cuda_mismatch(version, cuda) is None for version in allowed)


@pytest.mark.parametrize("cuda", [None, "11.8"])
@pytest.mark.parametrize("ort", ["1.26.0", "1.27.0"])
def test_a_torch_that_no_onnxruntime_gpu_goes_with_has_to_be_replaced_too(ort: str, cuda: str | None) -> None:
    said = cuda_mismatch(ort, cuda)
    assert said is not None and said.endswith("pip install --force-reinstall torch 'onnxruntime-gpu>=1.27'")
