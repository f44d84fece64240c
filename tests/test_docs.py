"""What the pages in docs/ tell a user to type works as written, and what they say of figures and options is so.

Every line of every code block is accounted for: it is run on the small model, or it is in one of the tables below with
the reason. The Chinese pages have the same code (test_translations.py).
"""

import argparse
import base64
import configparser
import importlib
import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluate.miniature import make
from safetensors.torch import save_file
from snippets import ROOT, SMALL, Parsed, Shell, blocks, make_home, make_int4_checkpoint

from qvl_edge import Runtime
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import QuantConfig
from qvl_edge.engine.budget import Plan, by_profile, estimate, longest_context
from qvl_edge.evaluate import synthetic
from qvl_edge.published import published_config

pytestmark = pytest.mark.slow

PAGES = sorted((ROOT / "docs").glob("*.md"))
MAKES_ITS_BUNDLE = {"fine-tune.md", "quantize.md", "quickstart.md"}  # the others begin with one

# Blocks that are no commands, by page and first line
SHOWN = {
    ("memory.md", "GB                         12g        8g        6g"): "what fit prints; compared below",
    ("ray.md", "POST /answer"): "a request; tests/test_ray.py sends such ones",
    ("server.md", "curl -s http://127.0.0.1:8000/v1/models"): "tests/server/test_serve.py runs the whole block",
}
# Lines that are only parsed here: by the command's own parser, up to the point where it would begin
PARSED = {
    "python -m benchmarks.compression --out compression": (
        "half an hour; tests/evaluate/test_compression.py runs it shorter"
    ),
    "python -m benchmarks.latency demo-output/bundle --peer qvl_edge/demo/checkpoint -p 512 -n 128 -d 0,2048 -r 5": (
        "minutes; tests/test_bench.py runs it shorter"
    ),
    "python -m benchmarks.qwen_tables demo-output/bundle --device cpu --tokens 256": (
        "minutes; tests/test_qwen_tables.py runs it shorter"
    ),
}
PARSED_PREFIXES = {
    "qvl-edge judge": "needs a judge; tests/evaluate/test_judge.py has one",
    "qvl-edge serve": "does not end; tests/server/test_serve.py starts it",
    "qvl-edge pull": "needs the network",
}
# Lines that do not run here at all
ELSEWHERE = {
    "python -m examples.ray.serve --replicas 2 --max-replicas 4": "does not end; tests/test_ray.py runs it",
    'python -m examples.ray.batch IMAGES OUT --question "Describe the picture with boxes."': "as the line above",
    "QVL_EDGE_API_KEY=… MODEL=/path/to/BUNDLE docker compose up": "needs docker",
    "git -C CHECKPOINT lfs pull": "needs git-lfs and the network",
    "apt-get install gcc python3-dev": "changes the machine",
    "pip uninstall -y onnxruntime onnxruntime-gpu": "changes the machine",
}
# Options that pages name and that are those of other programs
OTHERS_OPTIONS = set(
    "--share --inbrowser --use_lora --trust-remote-code --max-num-seqs --gpu-memory-utilization --kv-cache-dtype "
    "--limit-mm-per-prompt --tensor-parallel-size --from --pip-args --constraints".split()
)


def shell_lines(page: Path) -> list[str]:
    """The lines to be typed, in their order. AssertionError for a block that nobody accounts for."""
    found = []
    for language, text in blocks(page):
        first = text.splitlines()[0]
        if language == "python" or (page.name, first) in SHOWN:
            continue
        if language == "json":
            json.loads(text)
            continue
        if language == "jsonl":
            assert all(json.loads(line) for line in text.splitlines())
            continue
        if language == "toml":
            assert tomllib.loads(text)
            continue
        if language == "ini":
            assert configparser.ConfigParser(interpolation=None, strict=False).read_string(text) is None
            continue
        assert language in ("", "sh"), f"{page.name}: a block of {language} that no test knows: {first}"
        found += [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return found


def needs_cuda(line: str) -> bool:
    return "--device cuda" in line or line.startswith("python -m benchmarks.gpu")


def write_adapter(folder: Path) -> None:
    """A LoRA of the small model as PEFT leaves it, with B = 0.01."""
    folder.mkdir()
    targets = ["c_attn", "attn.c_proj", "w1", "w2"]  # of Qwen-VL's finetune.py
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    base, tensors = Checkpoint(SMALL), {}
    for name in base.names:
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.endswith(tuple(f".{target}" for target in targets)):
            outputs, inputs = base.shape(name)
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.full((2, inputs), 1 / inputs)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.full((outputs, 2), 0.01)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that pages take for granted; each page gets a copy."""
    folder = tmp_path_factory.mktemp("docs")
    make_home(folder, scenes=1)
    (folder / "Qwen-VL-Chat").unlink()
    shutil.copytree(SMALL, folder / "Qwen-VL-Chat")
    generation = folder / "Qwen-VL-Chat/generation_config.json"
    settings = json.loads(generation.read_text()) | {"max_new_tokens": 32}  # some questions are beyond the small model
    generation.write_text(json.dumps(settings))
    shutil.copytree(folder / "Qwen-VL-Chat", folder / "MERGED")
    (folder / "MERGED/qwen.tiktoken").unlink()
    write_adapter(folder / "ADAPTER")
    make("textvqa", folder / "TextVQA")
    make("touchstone", folder)
    for name in ("train.json", "held-out.json"):
        shutil.copy(folder / "conversations.json", folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command, options in (("quantize.gptq", ["--calibration", "conversations.json"]), ("export.vit", [])):
            main = importlib.import_module(command).main
            assert main(["Qwen-VL-Chat", "BUNDLE", *options]) == 0
    make_int4_checkpoint(folder / "BUNDLE", folder / "Qwen-VL-Chat-Int4")
    return folder


@pytest.fixture
def home(furnished: Path, tmp_path: Path, vit_cache: Path) -> Path:
    folder = Path(shutil.copytree(furnished, tmp_path / "home"))
    (folder / "cache").symlink_to(vit_cache.parent)  # exports in processes: tests/test_readme.py
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_line_of_the_page_does_what_it_says(page: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = synthetic.write_scenes
    monkeypatch.setattr(synthetic, "write_scenes", lambda folder, count: draw(folder, min(count, 3)))
    if page.name in MAKES_ITS_BUNDLE:
        shutil.rmtree(home / "BUNDLE")
    shell = Shell(home)
    for line in shell_lines(page):
        if line in ELSEWHERE:
            continue
        if line.startswith("pip install -c constraints.txt -e "):
            asked = re.fullmatch(r"pip install -c constraints\.txt -e '\.\[([\w,]+)\]'", line)
            assert asked, line
            assert set(asked[1].split(",")) <= extras(), line
        elif line in PARSED or line.startswith(tuple(PARSED_PREFIXES)):
            with pytest.raises(Parsed):
                shell(line, only_parse=True)
        else:
            assert re.match(r"qvl-edge |python -m |cp ", line), f"{page.name}: no test accounts for: {line}"
            if needs_cuda(line) and torch.cuda.is_available():
                continue  # here it would work, and take its time
            said = shell(line)
            if needs_cuda(line):
                assert said.code != 0 and "CUDA" in said.err, f"{page.name}: {line}\n{said.err}"
                assert "Traceback" not in said.err, line
            else:
                assert said.code == 0, f"{page.name}: {line}\n{said.out}{said.err}"
                assert "qvl-edge run" not in line or said.out.strip(), line
                assert "--draw out.png" not in line or (home / "out.png").exists(), line


def extras() -> set[str]:
    """The extras of setup.py."""
    return set(re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text(), re.M))


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_a_page_that_names_a_benchmark_says_that_it_needs_the_clone(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert ("python -m benchmarks" in text) == ("clone" in text)


PYTHON = [(page, text) for page in PAGES for language, text in blocks(page) if language == "python"]


@pytest.fixture(scope="module")
def server_url(furnished: Path) -> Iterator[str]:
    from server.harness import serving

    from qvl_edge.engine.worker import Worker

    bundle = furnished / "BUNDLE"
    with serving(Worker(Runtime.from_pretrained(bundle, device="cpu", slots=2)), model="MODEL") as running:
        yield running.url


@pytest.mark.parametrize(("page", "snippet"), PYTHON, ids=[page.stem for page, _ in PYTHON])
def test_the_python_snippet_runs(
    page: Path, snippet: str, furnished: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(furnished)
    if "http://127.0.0.1:8000" in snippet:
        image = base64.b64encode((furnished / "street.jpg").read_bytes()).decode()
        snippet = snippet.replace("http://127.0.0.1:8000", request.getfixturevalue("server_url"))
        snippet = snippet.replace("base64,…", f"base64,{image}")
        snippet = re.sub(r'model="[^"]+"', 'model="MODEL"', snippet)
    exec(compile(snippet, page.name, "exec"), {})


def test_no_table_of_exceptions_holds_what_no_page_has() -> None:
    lines = {line for page in PAGES for line in shell_lines(page)}
    firsts = {(page.name, text.splitlines()[0]) for page in PAGES for _, text in blocks(page)}
    assert set(SHOWN) <= firsts
    assert PARSED.keys() | ELSEWHERE.keys() <= lines
    assert all(any(line.startswith(prefix) for line in lines) for prefix in PARSED_PREFIXES)


def test_options_that_pages_name_are_those_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: list[argparse.ArgumentParser] = []

    def note(parser: argparse.ArgumentParser, *given: object) -> None:
        parsers.append(parser)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", note)
    for name in ("qvl_edge.__main__", "quantize.gptq", "export.vit", "benchmarks.small_model.train"):
        with pytest.raises(Parsed):
            importlib.import_module(name).main()
    known = set[str]()
    # by their text: Ray may not be installed, and benchmarks.compiled loads triton as its interpreter must not be
    for file in [*(ROOT / "examples/ray").glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        known |= set(re.findall(r'"(--[\w-]+)"', file.read_text(encoding="utf-8")))
    while parsers:
        for action in parsers.pop()._actions:
            known |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    for page in PAGES:
        for words in re.findall(
            r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.S | re.M)
        ):
            for option in re.findall(r"(?<!\S)--[a-z][\w-]*", words):
                assert option in known | OTHERS_OPTIONS, f"{page.name}: {option}"


def test_the_table_of_parts_is_what_fit_prints(home: Path) -> None:
    (table,) = (text for _, text in blocks(ROOT / "docs/memory.md") if text.startswith("GB "))
    said = Shell(home)("qvl-edge fit Qwen/Qwen-VL-Chat-Int4 --gpu 12GiB")
    assert table in said.out


def test_the_rows_of_the_quickstart_are_what_the_budget_computes() -> None:
    rows = re.findall(
        r"^\| (.+?) \| `(\w+)` \| .+? \| ([\d.]+) GB \| ([\d,]+) \|$",
        (ROOT / "docs/quickstart.md").read_text(encoding="utf-8"),
        re.M,
    )
    assert len(rows) == 5
    published = published_config("Qwen/Qwen-VL-Chat-Int4")
    assert published is not None and isinstance(published.quantization, QuantConfig)
    for machine, profile, total, longest in rows:
        (size,) = re.findall(r"(\d+) GB", machine)
        on_cpu = machine.startswith("CPU")
        plan = by_profile(
            Plan("cpu", torch.float32, activations="int8") if on_cpu else Plan("cuda", torch.float16), profile
        )
        taken = estimate(published, replace(plan, context=2048)).total / 1e9
        assert f"{taken:.1f}" == total, machine
        memory = int(size) << 30
        assert f"{longest_context(published, plan, memory):,}" == longest, machine
