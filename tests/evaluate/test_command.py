"""qvl-edge evaluate, end to end on miniature data sets in their published formats."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import qvl_edge.demo
from export.part import export_vit
from quantize.job import quantize_checkpoint
from qvl_edge import Runtime
from qvl_edge.__main__ import main
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.commands import evaluate as command
from qvl_edge.config import QuantConfig
from qvl_edge.demo.scenes import UNSEEN, make_scene, write_conversations
from qvl_edge.evaluate import TASKS, evaluation, predict
from qvl_edge.evaluate.evaluation import first_items
from qvl_edge.evaluate.report import WORDS
from qvl_edge.evaluate.synthetic import write_scenes
from qvl_edge.evaluate.task import Item, QualityDataError
from qvl_edge.lora import LoraCheckpoint

from .miniature import MAKERS, Miniature, make

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
SMALL = Path(qvl_edge.demo.__file__).parent / "checkpoint"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an int4 bundle, and the float checkpoint under another name."""
    folder = tmp_path_factory.mktemp("home")
    checkpoint = Checkpoint(SMALL)
    quantize_checkpoint(checkpoint, folder / "int4", QuantConfig(), None)
    export_vit(checkpoint, folder / "int4")
    (folder / "float").symlink_to(SMALL)
    return folder


@pytest.fixture(autouse=True)
def cache(vit_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(vit_cache.parent))


@pytest.fixture(scope="module")
def loaded(home: Path) -> dict:
    """Each model once for the whole module: loading is not what is tested here."""
    return {}


def miniature(task: str, folder: Path) -> Miniature:
    folder.mkdir(parents=True, exist_ok=True)
    if task == "synthetic":
        return Miniature(write_scenes(folder, 3), folder)
    if task == "perplexity":
        return Miniature(write_conversations(folder, UNSEEN + 5, 2), folder)
    return make(task, folder)


def run(home: Path, out: Path, task: str, data: Miniature, *more: str) -> dict:
    arguments = [str(home / "int4"), "--task", task, "--data", str(data.data), "--images", str(data.images)]
    assert main(["evaluate", *arguments, "--out", str(out), "--device", "cpu", *more]) == 0
    return json.loads((out / f"{task}.int4.json").read_text())


def test_every_task_has_a_miniature_data_set() -> None:
    assert set(TASKS) == {*MAKERS, "synthetic", "perplexity"}


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_runs_from_its_file_to_a_report(
    task: str, home: Path, loaded: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    load = Runtime.from_pretrained

    def once(path, **options):
        options.pop("progress")
        key = (str(path), str(sorted(options.items())))
        if key not in loaded:
            loaded[key] = load(path, **options)
        return loaded[key]

    monkeypatch.setattr(Runtime, "from_pretrained", once)
    data = miniature(task, tmp_path / "data")
    found = run(home, tmp_path / "out", task, data, "--against", str(home / "float"))
    assert found["task"] == task and found["items"] > 0
    for row in found["rows"]:
        mean = row["model"]
        assert row["n"] == 1 or mean["low"] <= mean["value"] <= mean["high"]
        assert row["difference"]["better"] + row["difference"]["worse"] <= row["n"]
    printed = capsys.readouterr().out
    assert ("| int4 | float | difference |" in printed) == bool(found["rows"])
    if task == "touchstone":
        asked = (tmp_path / "out" / "touchstone.int4.requests.jsonl").read_text(encoding="utf-8").splitlines()
        page = (tmp_path / "out" / "touchstone.int4.html").read_text(encoding="utf-8")
        assert WORDS["en"]["nothing"] not in page and WORDS["en"]["unscored"] in page
        assert len(asked) == 2 * found["items"] and "qvl-edge judge" in printed
    else:
        assert found["rows"]
    page = (tmp_path / "out" / f"{task}.int4.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")


def test_an_adapter_goes_to_the_float_model_of_the_two(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name, base = "lm_head", Checkpoint(SMALL)
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [name], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    outputs, inputs = base.shape(f"{name}.weight")
    shapes = {"A": (1, inputs), "B": (outputs, 1)}
    parts = {f"base_model.model.{name}.lora_{part}.weight": torch.ones(shape) for part, shape in shapes.items()}
    save_file(parts, adapter / "adapter_model.safetensors")
    data, lora = miniature("perplexity", tmp_path / "data"), ["--lora", str(adapter), "--limit", "2"]
    merged = LoraCheckpoint(SMALL, adapter).fingerprint
    found = run(home, tmp_path / "out", "perplexity", data, "--against", str(home / "float"), *lora)
    assert found["against"]["identity"] == merged
    arguments = ["--task", "perplexity", "--data", str(data.data), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["evaluate", str(home / "float"), *arguments, *lora]) == 0
    own = json.loads((tmp_path / "out/perplexity.float-adapter.json").read_text())
    assert own["model"]["identity"] == merged
    assert main(["evaluate", str(home / "int4"), *arguments, *lora]) == 1
    assert "is quantized, and a LoRA cannot be merged" in capsys.readouterr().err


def test_a_killed_evaluation_started_again_gives_the_report_of_an_uninterrupted_one(home: Path, tmp_path: Path) -> None:
    data = miniature("synthetic", tmp_path / "data")
    whole = run(home, tmp_path / "whole", "synthetic", data)
    # the same command in a process of its own that is killed at its second chunk, as the last of its lines is written
    script = (
        "import os, signal, sys\n"
        "from qvl_edge.__main__ import main\n"
        "from qvl_edge.evaluate import predict\n"
        "predict.CHUNK = 4\n"
        "made = predict.Predictor.predict\n"
        "count = iter(range(9))\n"
        "def die(self, items):\n"
        "    if next(count) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return made(self, items)\n"
        "predict.Predictor.predict = die\n"
        "main(['evaluate', *sys.argv[1:]])\n"
    )
    out = tmp_path / "killed"
    arguments = [str(home / "int4"), "--task", "synthetic", "--data", str(data.data), "--images", str(data.images)]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--out", str(out), "--device", "cpu"], cwd=ROOT, capture_output=True
    )
    assert done.returncode == -9, done.stderr
    (lines,) = out.glob("*.jsonl")
    kept = len(lines.read_text().splitlines()) - 1
    assert kept == 8 < whole["items"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "CHUNK", 4)
        assert run(home, out, "synthetic", data) == run(home, tmp_path / "again", "synthetic", data)
    assert run(home, out, "synthetic", data)["rows"] == whole["rows"]
    for name in ("synthetic.int4.jsonl", "synthetic.int4.html"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--data", "empty.jsonl"], "empty.jsonl"),
        (["--data", "twice.jsonl"], "two items with the id 'a'"),
    ],
)
def test_data_that_cannot_be_used_is_named(
    arguments: list[str], said: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    make_scene(UNSEEN).image.save(tmp_path / "0.png")
    line = {"question_id": "a", "images": ["0.png"], "kind": "count", "language": "en", "question": "?", "answer": "1"}
    (tmp_path / "twice.jsonl").write_text((json.dumps({**line, "box": None}) + "\n") * 2)
    out = tmp_path / "out"
    assert main(["evaluate", str(home / "int4"), "--task", "synthetic", "--out", str(out), *arguments]) == 1
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_damaged_picture_and_a_wrong_model_are_named_before_anything_is_asked(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(evaluation, "predict_all", None)
    data = miniature("synthetic", tmp_path / "data")
    arguments = [str(home / "int4"), "--task", "synthetic", "--data", str(data.data), "--out", str(tmp_path / "out")]
    assert main(["evaluate", *arguments, "--against", str(tmp_path / "none")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err
    last = data.images / "2.png"
    last.write_bytes(last.read_bytes()[:3000])
    assert main(["evaluate", *arguments]) == 1
    said = capsys.readouterr().err
    assert "item '2-find'" in said and "2.png" in said


def test_other_pictures_under_the_same_names_are_other_data(home: Path, tmp_path: Path, capsys) -> None:
    data = miniature("synthetic", tmp_path / "data")
    run(home, tmp_path / "out", "synthetic", data, "--limit", "2")
    (data.images / "0.png").write_bytes((data.images / "1.png").read_bytes())
    with pytest.raises(AssertionError):
        run(home, tmp_path / "out", "synthetic", data, "--limit", "2")
    assert "data" in capsys.readouterr().err


def test_a_limit_takes_whole_units_and_is_1_or_more() -> None:
    items = [Item(str(index), ("?",), unit=f"u{index // 4}") for index in range(12)]
    assert [len(first_items(items, limit)) for limit in (1, 4, 5, 99, None)] == [4, 4, 8, 12, 12]
    assert len(first_items([Item(str(index), ("?",)) for index in range(3)], 2)) == 2
    for limit in (0, -1):
        with pytest.raises(QualityDataError, match=f"--limit is {limit}"):
            first_items(items, limit)


def test_a_folder_that_cannot_be_written_is_a_message(home: Path, tmp_path: Path, capsys) -> None:
    data = miniature("synthetic", tmp_path / "data")
    (tmp_path / "file").write_text("")
    arguments = [str(home / "int4"), "--task", "synthetic", "--data", str(data.data), "--limit", "1"]
    assert main(["evaluate", *arguments, "--out", str(tmp_path / "file")]) == 1
    assert "file" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named(tmp_path: Path, capsys) -> None:
    data = miniature("synthetic", tmp_path / "data")
    assert main(["evaluate", str(tmp_path / "none"), "--task", "synthetic", "--data", str(data.data)]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_help_names_every_task_and_an_unknown_one_is_answered_with_them(home: Path, capsys) -> None:
    named = set(re.findall(r"[\w+]+", command.__doc__.rpartition(":\n\n")[2]))
    assert named == set(TASKS)
    assert main(["evaluate", str(home / "int4"), "--task", "vqa"]) == 1
    said = capsys.readouterr().err
    assert "--task vqa does not exist" in said and all(task in said for task in TASKS)


def test_scenes_are_drawn_where_no_data_is_given(home: Path, tmp_path: Path, capsys) -> None:
    arguments = ["evaluate", str(home / "int4"), "--out", str(tmp_path), "--device", "cpu", "--limit", "2"]
    for _ in range(2):
        assert main([*arguments, "--task", "synthetic", "--scenes", "1"]) == 0
    assert (tmp_path / "scenes-1/0.png").exists()
    assert json.loads((tmp_path / "synthetic.int4.json").read_text())["items"] == 2
    assert main([*arguments, "--task", "gqa"]) == 1
    assert "--task gqa needs --data FILE" in capsys.readouterr().err


def test_options_of_precision_are_of_the_first_model_alone(home: Path, tmp_path: Path) -> None:
    data = miniature("synthetic", tmp_path / "data")
    found = run(home, tmp_path / "out", "synthetic", data, "--limit", "1", "--against", str(home / "int4"),
                "--kv-cache", "int8", "--max-context", "768")  # fmt: skip
    assert (found["model"]["name"], found["against"]["name"]) == ("int4", "int4-against")
    assert (found["model"]["kv_cache"], found["against"]["kv_cache"]) == ("int8", "float16")
    assert found["model"]["max_context"] == found["against"]["max_context"] == 768
