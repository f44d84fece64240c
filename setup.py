"""Packaging of qvl_edge; tool settings are in pyproject.toml, tested versions in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

# Floors have no known hole that can be reached from here; from the next major version on, nothing was tried.
RUNTIME = [
    "torch>=2.6,<3",  # torch.load could run code before (CVE-2025-32434)
    "numpy>=1.26,<3",
    "pillow>=13,<14",  # CVE-2026-96641
    "safetensors>=0.4.5,<1",
    "tiktoken>=0.14,<1",  # up to 0.12 a run of spaces takes quadratic time
    "regex>=2024.4.16",  # which tiktoken needs too; its versions are dates
    "filelock>=3.20.3,<5",  # CVE-2026-22701
    "tqdm>=4.66.3,<5",  # CVE-2024-34062
    "psutil>=5.9,<8",
]
EXPORT = ["onnx>=1.21,<2"]  # CVE-2026-27489
OPENVINO = ["openvino>=2026.4,<2027"]
DOWNLOAD = ["huggingface_hub>=1.0,<3"]
MODELSCOPE = ["modelscope-hub>=0.5,<1"]  # the client inside the package modelscope, without the rest of it
SERVE = [
    "starlette>=1.3.1,<2",  # CVE-2026-48710, and PYSEC-2026-248
    "uvicorn>=0.30,<0.55",  # its connections are subclassed: another version may lose their limits
    "h11>=0.16,<0.17",  # CVE-2025-43859; subclassed too
    "pydantic>=2.12,<3",
    "llguidance>=1.7,<2",
]
EVALUATE = ["openai>=1.60,<4"]  # the judge's client
PLOT = ["matplotlib>=3.9,<4"]
TRITON = "triton>=3.6,<4; platform_system == 'Linux'"
TRITON_WINDOWS = "triton-windows>=3.6,<4; platform_system == 'Windows'"  # not run by us

setup(
    name="qvl-edge",
    version="0.1.0",
    description="Qwen-VL and Qwen-VL-Chat (first generation) on consumer GPUs: int4, ONNX ViT, light runtime",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0 AND OFL-1.1",  # the font
    license_files=["LICENSE", "qvl_edge/text/fonts/OFL.txt"],
    keywords=["Qwen-VL", "vision-language", "GPTQ", "int4", "ONNX", "Triton", "grounding", "OpenAI API"],
    project_urls={"Upstream": "https://github.com/QwenLM/Qwen-VL"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Natural Language :: Chinese (Simplified)",
        "Natural Language :: English",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # benchmarks and tests run from a clone
    packages=find_packages(include=["kernels", "kernels.*", "qvl_edge", "qvl_edge.*", "quantize", "export"]),
    package_data={
        "kernels.gpu": ["tiles/*.json"],
        "qvl_edge": ["py.typed"],
        "qvl_edge.demo": ["checkpoint/*"],
        "qvl_edge.server": ["static/*"],
        "qvl_edge.text": ["fonts/*"],
    },
    install_requires=RUNTIME,
    extras_require={
        # one of the two runs the vision tower; installing both breaks either
        "cpu": ["onnxruntime>=1.23,<2"],
        "cuda": ["onnxruntime-gpu>=1.23,<2", TRITON, TRITON_WINDOWS],
        "openvino": OPENVINO,  # beside "cpu": a faster vision tower on a CPU
        "quantize": [],  # the solver needs what the runtime needs
        "export": EXPORT,
        "serve": SERVE,
        "evaluate": EVALUATE,
        # models by their name on a hub
        "download": DOWNLOAD,
        "modelscope": MODELSCOPE,
        "plot": PLOT,  # charts of `qvl-edge bench --output`
        "ray": [*SERVE, *EXPORT, "ray[serve,data]==2.60.0"],  # examples/ray, with the release that was tested
        # partners whose files we share; their pins exclude current transformers: an environment of their own
        "interop": [
            "auto-gptq==0.7.1",
            "optimum-onnx==0.1.0",
            "transformers==4.44.2",
            "datasets==2.21.0",
            "peft==0.11.1",
        ],
        "dev": [
            *EXPORT,
            *SERVE,
            *EVALUATE,
            *DOWNLOAD,
            *MODELSCOPE,
            *OPENVINO,
            TRITON,
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff>=0.8",
            "mypy>=1.13",
            *PLOT,
            # the server's tests: raw requests, fuzzing, and a browser that is found, not downloaded
            "httpx>=0.27",
            "schemathesis>=4",
            "playwright>=1.45",
            # the published score itself, to compare with
            "anls==0.0.2",
        ],
    },
    entry_points={"console_scripts": ["qvl-edge=qvl_edge.__main__:main"]},
)
