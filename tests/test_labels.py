"""Many pictures at once, and boxes as labels: runtime.map, `qvl-edge label`, and the files that other tools read."""

import json
from pathlib import Path

import pytest
from PIL import Image

from qvl_edge import ConfigError, ImageError, Runtime
from qvl_edge.__main__ import main
from qvl_edge.batch import answer_each
from qvl_edge.demo import SMALL_MODEL
from qvl_edge.demo.scenes import UNSEEN, make_scene
from qvl_edge.labels import Labelled, agreement, to_coco, to_labelme, to_yolo
from qvl_edge.text.boxes import parse_boxes

QUESTION = "Describe the picture with boxes."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six scenes, one of them in a folder of its own, and a file that is no picture."""
    made = tmp_path_factory.mktemp("scenes")
    (made / "more").mkdir()
    for index in range(6):
        make_scene(UNSEEN + index).image.save(made / ("more" if index == 5 else ".") / f"{index}.png")
    (made / "notes.txt").write_text("no picture")
    return made


@pytest.fixture(scope="module")
def truth(folder: Path) -> Path:
    """The known boxes of the scenes, written without our own writer."""
    images, annotations, names = [], [], list[str]()
    for index in range(6):
        file = f"more/{index}.png" if index == 5 else f"{index}.png"
        images.append({"id": index, "file_name": file, "width": 448, "height": 448})
        for shape in make_scene(UNSEEN + index).shapes:
            name = shape.name("en")
            names += [name] * (name not in names)
            x1, y1, x2, y2 = (cell * 28 for cell in shape.cells)
            category = names.index(name)
            annotations.append({"image_id": index, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    path = folder.parent / "truth.json"
    known = [{"id": index, "name": name} for index, name in enumerate(names)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": known}))
    return path


@pytest.fixture(scope="module")
def small(vit_cache: Path) -> Runtime:
    return Runtime.from_pretrained(SMALL_MODEL, device="cpu", slots=3, cache_dir=str(vit_cache))


@pytest.mark.slow
def test_map_answers_in_order_and_as_one_by_one(small: Runtime, folder: Path) -> None:
    files = sorted(folder.rglob("*.png"))
    alone = [small.ask(file, QUESTION, do_sample=False).text for file in files]
    assert [answer.text for answer in small.map(files, QUESTION, do_sample=False)] == alone
    assert len(set(alone)) > 3


@pytest.mark.slow
def test_a_stopped_map_is_continued_and_not_asked_again(small: Runtime, folder: Path, tmp_path: Path) -> None:
    files, out = sorted(folder.rglob("*.png")), tmp_path / "answers.jsonl"
    whole = [answer.text for answer in small.map(files, QUESTION, do_sample=False, stop=("zzz",))]
    begun = small.map(files, QUESTION, output=out, do_sample=False, stop=("zzz",))
    first = [next(begun), next(begun)]
    begun.close()
    with out.open("a") as file:
        file.write('{"image": "half a li')  # as a power cut leaves it
    asked: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        prepare = small.prepare
        patch.setattr(small, "prepare", lambda request: asked.append(request) or prepare(request))
        again = list(small.map(files, QUESTION, output=out, do_sample=False, stop=("zzz",)))
    assert [answer.text for answer in again] == whole and len(asked) == len(files) - 2
    assert again[0].boxes == first[0].boxes and again[0].to_dict() == first[0].to_dict()
    with pytest.raises(ConfigError, match=r"line 1 has question .* give another file"):
        next(small.map(files, "What is this?", output=out, do_sample=False, stop=("zzz",)))
    with pytest.raises(ConfigError, match=r"line 1 has image"):
        next(small.map(files[::-1], QUESTION, output=out, do_sample=False, stop=("zzz",)))


@pytest.mark.slow
def test_a_picture_that_cannot_be_read_has_its_error_in_its_place(small: Runtime, folder: Path) -> None:
    files = [folder / "0.png", folder / "notes.txt", folder / "1.png"]
    answers = list(answer_each(small, files, QUESTION, max_new_tokens=4))
    assert isinstance(answers[1], ImageError) and not any(isinstance(answers[i], Exception) for i in (0, 2))
    with pytest.raises(ImageError, match="notes.txt"):
        list(small.map(files, QUESTION, max_new_tokens=4))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["coco", "yolo", "labelme"])
def test_label_writes_a_file_that_other_tools_read(
    form: str, folder: Path, truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / ("labels.json" if form == "coco" else "labels")
    asked = ["label", str(SMALL_MODEL), str(folder), QUESTION, "--format", form, "--output", str(out)]
    assert main([*asked, "--truth", str(truth)]) == 0
    said = capsys.readouterr().out
    precision, recall = (float(said.split(f"{name} ")[1].split()[0]) for name in ("precision", "recall"))
    assert precision > 0.9 and recall > 0.9  # the small model finds what it was trained on
    assert f"on 6 pictures: {out}" in said
    if form == "coco":
        coco = json.loads(out.read_text())
        assert [image["file_name"] for image in coco["images"]][-1] == "more/5.png"
        ids = {image["id"] for image in coco["images"]}, {one["id"] for one in coco["categories"]}
        assert all(one["image_id"] in ids[0] and one["category_id"] in ids[1] for one in coco["annotations"])
        assert main([*asked]) == 0  # again: nothing is asked, the same file
        assert json.loads(out.read_text()) == coco
    elif form == "yolo":
        names = (out / "classes.txt").read_text().split("\n")
        lines = (out / "more/5.txt").read_text().splitlines()
        assert lines and all(int(line.split()[0]) < len(names) and len(line.split()) == 5 for line in lines)
    else:
        read = json.loads((out / "more/5.json").read_text())
        assert read["imageHeight"] == 448 and read["shapes"][0]["shape_type"] == "rectangle"


def test_pycocotools_loads_what_is_written(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    boxes = parse_boxes("<ref>car</ref><box>(0,0),(500,1000)</box>", image_sizes=[(200, 100)])
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(to_coco([Labelled("a.jpg", 200, 100, boxes)])))
    loaded = coco.COCO(path)
    (one,) = loaded.loadAnns(loaded.getAnnIds())
    assert one["bbox"] == [0, 0, 100, 100] and loaded.annToMask(one).sum() == 100 * 100


def test_the_formats_have_their_units() -> None:
    text = "<ref>car</ref><box>(100,200),(300,1000)</box><quad>(0,0),(500,0),(500,500),(0,500)</quad>"
    picture = Labelled("a.jpg", 200, 100, parse_boxes(text, image_sizes=[(200, 100)]))
    first, second = to_coco([picture])["annotations"]
    assert first["bbox"] == [20, 20, 40, 80] and first["area"] == 3200
    assert second["segmentation"] == [[0, 0, 100, 0, 100, 50, 0, 50]]
    assert to_yolo(picture, ["bus", "car"]).splitlines()[0] == "1 0.200000 0.600000 0.200000 0.800000"
    shapes = to_labelme(picture)["shapes"]
    assert shapes[0]["points"] == [[20, 20], [60, 100]] and shapes[1]["shape_type"] == "polygon"


def test_agreement_matches_each_known_box_once() -> None:
    def coco(*boxes: tuple[int, int, int, int]) -> dict:
        annotations = [{"image_id": 1, "category_id": 1, "bbox": list(box)} for box in boxes]
        images, names = [{"id": 1, "file_name": "a"}], [{"id": 1, "name": "car"}]
        return {"images": images, "annotations": annotations, "categories": names}

    found = agreement(coco((0, 0, 10, 10), (0, 0, 10, 9), (50, 50, 10, 10)), coco((0, 0, 10, 10), (90, 90, 5, 5)))
    assert (found.right, found.found, found.known) == (1, 3, 2)
    assert found.precision == pytest.approx(1 / 3) and found.recall == 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--format", "yolo"], "2 pictures, whose yolo labels would be one file"),
        (["--output", "no/folder/x.json"], "does not exist"),
        (["--truth", "notes.json"], "is no COCO file"),
        (["--top-p", "7"], "top_p is 7"),
    ],
)
def test_what_cannot_be_labelled_is_refused_before_loading(
    change: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (9, 9)).save(tmp_path / "pictures" / name)
    (tmp_path / "notes.json").write_text("{}")
    assert main(["label", str(SMALL_MODEL), "pictures", QUESTION, *change]) == 1
    said = capsys.readouterr().err
    assert words in said and "loaded" not in said
