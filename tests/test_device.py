"""A card that the kernels do not run on, or that others hold, ends a load with what to do; so does one that is not
there, in commands and in benchmarks."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import qvl_edge.demo
from qvl_edge import FitError, Runtime
from qvl_edge.__main__ import main
from qvl_edge.cards import card_named
from qvl_edge.engine import device as devices
from qvl_edge.engine.device import check_cpu, check_dtype, find_device, named_with_others
from qvl_edge.errors import ConfigError
from qvl_edge.options import LoadOptions

SMALL = Path(qvl_edge.demo.__file__).parent / "checkpoint"
TRAINING = ["1-2-3", "4711", "7400 MiB", "python, train"]
GB = 10**9
WithCard = Callable[..., None]


@pytest.fixture
def with_card(monkeypatch: pytest.MonkeyPatch) -> WithCard:
    """Makes torch see a card of 12 GB (or `count`), beside which nothing else computes unless `programs` says so."""

    def make(
        capability: tuple[int, int] = (8, 6),
        *,
        free: int = 12 * GB - devices.MIN_FREE,
        refuses: str = "",
        count: int = 1,
        programs: list[list[str]] | None = None,
    ) -> None:
        major, minor = capability
        card = SimpleNamespace(name="NVIDIA GeForce", major=major, minor=minor, uuid="1-2-3")

        def memory(_: torch.device) -> tuple[int, int]:
            if refuses:
                raise RuntimeError(refuses)
            return free, 12 * GB

        def nvidia_smi(*_: str) -> list[list[str]]:
            assert programs is not None, "nvidia-smi takes its time, and was asked without need"
            return programs

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: count - 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
        monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
        monkeypatch.setattr(devices, "nvidia_smi", nvidia_smi)

    return make


@pytest.mark.parametrize(("capability", "family"), [((6, 1), "Pascal"), ((7, 0), "Volta"), ((7, 2), "Volta")])
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_card_that_is_too_old_is_refused_before_anything_is_read(
    capability: tuple[int, int], family: str, device: str, with_card: WithCard, tmp_path: Path
) -> None:
    with_card(capability)
    major, minor = capability
    words = rf"GeForce is a {family} card of compute capability {major}\.{minor} \(sm_{major}{minor}\), the kernels "
    with pytest.raises(ConfigError, match=words + r"need 7\.5 \(sm_75\); add --device cpu .*auto-gptq.*RTX 20"):
        Runtime.from_pretrained(tmp_path / "nothing", device=device)


def test_the_command_says_it_in_one_line(with_card: WithCard, capsys: pytest.CaptureFixture[str]) -> None:
    with_card((6, 1))
    assert main(["run", str(SMALL), "Hello", "--device", "cuda"]) == 1
    assert capsys.readouterr().err.startswith("qvl-edge run: NVIDIA GeForce is a Pascal card of compute capability 6.1")


def test_turing_computes_in_float16_alone(with_card: WithCard, tmp_path: Path) -> None:
    with_card((7, 5))
    with pytest.raises(ConfigError, match=r"'bfloat16', which NVIDIA GeForce \(Turing\) does not .*; pass 'float16'"):
        Runtime.from_pretrained(tmp_path / "nothing", device="cuda", dtype="bfloat16")
    with_card((8, 0))
    check_dtype(find_device("cuda"), "bfloat16")
    check_dtype(torch.device("cpu"), "bfloat16")


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("RTX 3060", (12, (8, 6))),
        ("NVIDIA GeForce RTX 2080 Ti", (11, (7, 5))),
        ("t4", (16, (7, 5))),
        ("12GB", None),
        ("RTX 9999", None),
    ],
)
def test_cards_are_known_by_their_names(name: str, card: tuple | None) -> None:
    assert card_named(name) == card


@pytest.mark.parametrize(("name", "code"), [("RTX 3060", 0), ("RTX 2060 12GB", 0), ("GTX 1650", 1)])
def test_fit_takes_a_card_by_its_name(name: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "Qwen/Qwen-VL-Chat-Int4", "--gpu", name, "--json"]) == code
    parts = json.loads(capsys.readouterr().out)["profiles"]["6g"]["parts"]
    # a card of Turing multiplies a prompt by one projection at a time in float16: w1 and w2, 180 MB
    assert (parts["workspace"] > 2 * 2 * 11008 * 4096) == ("3060" not in name)


def test_fit_refuses_a_card_that_is_too_old_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "Qwen/Qwen-VL-Chat-Int4", "--gpu", "GTX 1080 Ti"]) == 1
    assert "GTX 1080 Ti is a Pascal card" in capsys.readouterr().err


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (12, 0)])
def test_a_card_that_the_kernels_run_on_is_taken(capability: tuple[int, int], with_card: WithCard) -> None:
    with_card(capability)
    assert find_device("auto") == find_device("cuda") == find_device("cuda:0") == torch.device("cuda:0")
    assert find_device("cpu") == find_device("cpu:0") == torch.device("cpu")


def test_cuda_is_the_current_device_under_its_number(with_card: WithCard) -> None:
    with_card(count=3)
    assert find_device("auto") == find_device("cuda") == find_device("cuda:2") != find_device("cuda:0")
    with pytest.raises(ConfigError, match="torch sees 3 CUDA devices; use cuda:0 or cuda:1 or cuda:2"):
        find_device("cuda:3")


def test_images_may_be_encoded_on_a_card_that_is_too_old_for_the_kernels(with_card: WithCard) -> None:
    with_card((6, 1))
    assert find_device("cuda", option="vision_device", kernels=False) == torch.device("cuda:0")


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x", ""])
def test_a_device_that_is_not_known_is_refused_under_the_name_of_its_option(name: str) -> None:
    with pytest.raises(ConfigError, match=f"vision_device is '{name}', expected 'auto', 'cpu', 'cuda' or 'cuda:N'"):
        find_device(name, option="vision_device")


def test_a_card_whose_number_is_too_high_is_named_with_how_many_there_are(with_card: WithCard) -> None:
    with_card()
    with pytest.raises(ConfigError, match="'cuda:1', but torch sees 1 CUDA device; use cuda:0"):
        find_device("cuda:1")


def test_a_card_that_another_program_keeps_for_itself_is_named_with_that_program(with_card: WithCard) -> None:
    busy = "CUDA error: CUDA-capable device(s) is/are busy or unavailable"
    another_card = ["GPU-9", "1", "9 MiB", "elsewhere"]
    with_card(
        refuses=f"{busy}\nCompile with TORCH_USE_CUDA_DSA",
        programs=[["GPU-" + TRAINING[0], *TRAINING[1:]], another_card],
    )
    with pytest.raises(ConfigError) as raised:
        find_device("cuda")
    said = str(raised.value)
    assert busy in said and "python, train (pid 4711, 7400 MiB)" in said and "--device cpu" in said
    assert "elsewhere" not in said and "DSA" not in said


def test_where_memory_is_short_the_programs_that_share_the_card_are_named(with_card: WithCard) -> None:
    with_card(free=GB // 10, programs=[TRAINING])
    with pytest.raises(
        FitError, match=r"cuda:0 \(shared with python, train \(pid 4711, 7400 MiB\)\) has 0\.10 GB free"
    ):
        Runtime.from_pretrained(SMALL, device="cuda")


def test_a_card_that_is_all_but_free_is_not_asked_who_uses_it(with_card: WithCard) -> None:
    with_card()
    assert named_with_others(find_device("cuda")) == "cuda:0"


MODEL_BENCHMARKS = ("memory", "latency", "qwen_tables", "soak", "serve_load", "attacks", "lookup")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here they would run")
@pytest.mark.parametrize("name", MODEL_BENCHMARKS)
@pytest.mark.slow
def test_without_cuda_each_benchmark_of_a_model_ends_with_the_error_that_names_it(name: str) -> None:
    run = importlib.import_module(f"benchmarks.{name}").main
    with pytest.raises(SystemExit, match=rf"benchmarks\.{name}: device is 'cuda', but torch .* sees no CUDA device"):
        run([str(SMALL), "--device", "cuda"])


def test_a_cpu_without_avx2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_avx2_supported", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(ConfigError, match="has no AVX2, which products with packed weights need"):
        check_cpu()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    check_cpu()


def test_activations_in_int8_are_of_a_cpu(with_card: WithCard) -> None:
    with_card()
    with pytest.raises(ConfigError, match="activations is 'int8' and the model runs on cuda:0"):
        Runtime.from_pretrained("nowhere", device="cuda", activations="int8")
    assert LoadOptions().activations_on("cuda:0") == "float"
    assert main(["fit", "Qwen/Qwen-VL", "--gpu", "8GB", "--activations", "int8"]) == 1
