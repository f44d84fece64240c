"""Which onnxruntime-gpu goes with which torch: in one process both have to use one CUDA.

Source: onnxruntime's release notes and the packages on PyPI. onnxruntime-gpu up to 1.26 is built for CUDA 12, from 1.27
on for CUDA 13; it takes cuBLAS and cuDNN from the process, where importing torch has put its own.
"""

import re

LAST_FOR_CUDA_12 = (1, 26)
PACKAGES = {  # pip requirements by torch's CUDA; before 1.22 there is no 8-bit product on CUDA
    12: "onnxruntime-gpu>=1.22,<1.27",
    13: "onnxruntime-gpu>=1.27",
}


def cuda_mismatch(ort_version: str, torch_cuda: str | None) -> str | None:
    """Why the two do not go together, ending in the command that fixes it; None if they do.

    ort_version: of onnxruntime-gpu, as "1.31.1". torch_cuda: `torch.version.cuda`, as "12.8"; None for a torch without
    CUDA.
    """
    built = 12 if tuple(int(number) for number in re.findall(r"\d+", ort_version)[:2]) <= LAST_FOR_CUDA_12 else 13
    found = int(torch_cuda.partition(".")[0]) if torch_cuda else None
    if found == built:
        return None
    torch_side = f"CUDA {found}" if found else "CPU"
    said = f"onnxruntime-gpu {ort_version} is built for CUDA {built} and torch for {torch_side}"
    if found in PACKAGES:
        return f"{said}; pip install '{PACKAGES[found]}'"
    # what PyPI has under the name torch is for CUDA 13 (2.14)
    return f"{said}; pip install --force-reinstall torch '{PACKAGES[13]}'"
