"""docs/parity.md and its Chinese twin: a row for each of upstream's snippets, and each row's tests are there."""

import ast
import json
import re
from pathlib import Path
from typing import NamedTuple

from snippets import ROOT

TESTS = ROOT / "tests"
SHEET = json.loads((TESTS / "data/parity.json").read_text(encoding="utf-8"))
SNIPPETS = {snippet["id"]: snippet for snippet in SHEET["snippets"]}
# counted in the files at the commits that parity.json names, the citation left out
COUNTS = {"README.md": 16, "README_CN.md": 16, "TUTORIAL.md": 15, "TUTORIAL_zh.md": 13}
VERDICTS = {"same": "相同", "differs": "有差别", "not supported": "不支持"}


class Row(NamedTuple):
    """A line of the tables; `tests` are paths below tests/ with the function's name."""

    id: str
    section: str
    title: str
    verdict: str
    differs: str
    tests: tuple[str, ...]


def rows(page: str) -> list[Row]:
    lines = re.findall(r"^\| ([RT]\d+) \|(.+)\|$", (ROOT / page).read_text(encoding="utf-8"), re.M)
    found = []
    for number, line in lines:
        section, title, verdict, differs, tests = (cell.strip() for cell in line.split("|"))
        file = f"parity/test_upstream_{'readme' if number[0] == 'R' else 'tutorial'}.py"
        names = (name if "::" in name else f"{file}::{name}" for name in re.findall(r"`([^`]+)`", tests))
        found.append(Row(number, section, title, verdict, differs, tuple(names)))
    return found


def functions_of(file: Path) -> set[str]:
    return {
        node.name
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_snippet_has_a_number_and_a_row() -> None:
    for file, count in COUNTS.items():
        numbers = [int(id[1:]) for id, snippet in SNIPPETS.items() if file in snippet["sections"]]
        assert numbers == list(range(1, count + 1)), file
    assert set(SHEET["commits"]) == set(COUNTS)
    assert [row.id for row in rows("docs/parity.md")] == list(SNIPPETS)


def test_sections_and_titles_are_those_of_the_list() -> None:
    for page, position in (("docs/parity.md", 0), ("docs/zh/parity.md", -1)):
        for row in rows(page):
            assert row.section == list(SNIPPETS[row.id]["sections"].values())[position], (page, row)
    assert [row.title for row in rows("docs/parity.md")] == [snippet["title"] for snippet in SNIPPETS.values()]


def test_both_languages_have_the_same_verdicts_and_tests() -> None:
    english, chinese = rows("docs/parity.md"), rows("docs/zh/parity.md")
    assert [(row.id, VERDICTS[row.verdict], row.tests) for row in english] == [
        (row.id, row.verdict, row.tests) for row in chinese
    ]


def test_a_difference_is_named_where_there_is_one() -> None:
    for page, same in (("docs/parity.md", "same"), ("docs/zh/parity.md", VERDICTS["same"])):
        assert all((row.differs == "–") == (row.verdict == same) for row in rows(page))
        # a difference by one word, and every part of such a list, is explained below the tables
        text = (ROOT / page).read_text(encoding="utf-8")
        explained = {name.strip("：.") for name in re.findall(r"^- \*\*([^*]+)\*\*", text, re.M)}
        used = {part for row in rows(page) for part in re.split(r"[、,；;]\s*", row.differs)}
        assert explained <= {part.partition(":")[0].partition("：")[0] for part in used}, page


def test_every_row_names_tests_that_are_there_and_every_snippet_test_has_a_row() -> None:
    cited: dict[str, set[str]] = {}
    for row in rows("docs/parity.md"):
        assert row.tests, row
        for test in row.tests:
            file, _, name = test.partition("::")
            cited.setdefault(file, set()).add(name)
    for file, names in cited.items():
        assert names <= functions_of(TESTS / file), file
        if file.startswith("parity/"):
            assert names == functions_of(TESTS / file)
    assert len(cited) == 4


def test_extras_that_the_sheet_names_are_those_of_the_package() -> None:
    extras = set(re.findall(r'^        "(\w+)": \[?', (ROOT / "setup.py").read_text(encoding="utf-8"), re.M))
    text = (ROOT / "docs/parity.md").read_text(encoding="utf-8")
    named = {extra for found in re.findall(r"`\.\[([\w,]+)\]`", text) for extra in found.split(",")}
    assert named == {"cpu", "export", "serve", "download", "modelscope"} and named <= extras
