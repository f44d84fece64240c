"""Every page of the documentation is there in English and in Chinese, and both say the same in the same order."""

import re
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAIRS = {ROOT / "README.md": ROOT / "README_CN.md"} | {
    page: ROOT / "docs/zh" / page.name for page in sorted((ROOT / "docs").glob("*.md"))
}

HAN = "\u4e00-\u9fff"
FULL = "，。；：！？（）、"
CODE = re.compile(r"`+[^`]+`+")
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")
ITEM = re.compile(r"\s*(?:[-*]|\d+\.)\s")
# a number that is no part of a name (int4, sm_80), what it is multiplied by, and its unit
NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])(\d[\d,]*(?:\.\d+)?)\s*(million|billion|megapixels?|万|亿)?"
    r"\s*([KMGT]i?B|kB|%|ms\b|s\b|seconds?|毫秒|秒)?"
)
SCALES = {"million": 1e6, "billion": 1e9, "megapixels": 1e6, "万": 1e4, "亿": 1e8}
UNITS = {"second": "s", "seconds": "s", "秒": "s", "毫秒": "ms"}
# the one freedom: a number up to twelve without a unit may be spelled out on one side
ENGLISH = [rf"\b{word}\b" for word in "zero one two three four five six seven eight nine ten eleven twelve".split()]
CHINESE = "零 一 [二两双] 三 四 五 六 七 八 九 十 十一 十二".split()


class Block(NamedTuple):
    """A part of a page: a heading ("h2"), "paragraph", "item" of a list, "table" or fenced "code sh"."""

    kind: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """The parts of the page in their order; texts keep their line breaks."""
    found: list[Block] = []
    fenced, open_ = False, False  # open_: the next line can go on with the last block
    for number, line in enumerate(page.splitlines(), 1):
        if line.strip().startswith("```"):
            if not fenced:
                found.append(Block(f"code {line.strip()[3:]}".strip(), "", number))
            fenced, open_ = not fenced, False
            continue
        if fenced:
            kind = found[-1].kind
        elif heading := re.match(r"(#+) ", line):
            kind = f"h{len(heading[1])}"
        else:
            kind = "table" if line.startswith("|") else "item" if ITEM.match(line) else "paragraph"
        goes_on = open_ and bool(line.strip()) and (kind == "paragraph" or kind == found[-1].kind == "table")
        if fenced or goes_on:
            found[-1] = found[-1]._replace(text=f"{found[-1].text}\n{line}".lstrip("\n"))
        elif line.strip():
            found.append(Block(kind, line, number))
        open_ = bool(line.strip()) and kind[0] != "h"
    return found


def without_comments(code: str) -> list[str]:
    return [re.sub(r"(^|\s+)#\s.*", "", line) for line in code.splitlines()]


def cells(table: str) -> list[list[str]]:
    return [re.split(r"(?<!\\)\|", row.strip())[1:-1] for row in table.splitlines()]


def numbers(text: str) -> Counter[str]:
    """How often each number is there, with its unit: 7 million and 700 万 are both 7000000."""
    text = CODE.sub(" ", LINK.sub(r"\1", text))
    return Counter(
        f"{float(digits.rstrip(',').replace(',', '')) * SCALES.get(scale, 1):.15g} {UNITS.get(unit, unit)}".strip()
        for digits, scale, unit in NUMBER.findall(text)
    )


def spans(text: str) -> set[str]:
    """What stands in backticks."""
    return {" ".join(span.strip("`").split()) for span in CODE.findall(text)}


def prose_differences(english: str, chinese: str) -> list[str]:
    """Numbers and code that only one of the two texts has."""

    def only(here: Counter[str], there: Counter[str], text: str, spellings: list[str]) -> list[str]:
        spelled = {str(n) for n, spelling in enumerate(spellings) if re.search(spelling, text, re.I)}
        return sorted(n for n in (here - there).elements() if n not in spelled)

    ours, theirs = numbers(english), numbers(chinese)
    found = [f"{n} is in English only" for n in only(ours, theirs, chinese, CHINESE)]
    found += [f"{n} is in Chinese only" for n in only(theirs, ours, english, ENGLISH)]
    return found + [f"`{span}` is in one language only" for span in sorted(spans(english) ^ spans(chinese))]


def differences(english: str, chinese: str) -> list[str]:
    """What the two pages do not share, each with the line of the Chinese page; [] for a faithful translation."""
    ours, theirs = blocks(english), blocks(chinese)
    for our, their in zip(ours, theirs, strict=False):
        if our.kind != their.kind:
            return [f"line {their.line} is {their.kind}, line {our.line} in English is {our.kind}"]
    if len(ours) != len(theirs):
        language, rest = ("English", ours) if len(ours) > len(theirs) else ("Chinese", theirs)
        return [f"{language} goes on at line {rest[min(len(ours), len(theirs))].line}"]
    found = []
    for our, their in zip(ours, theirs, strict=True):
        said: list[str] = []
        if our.kind.startswith("code"):
            if without_comments(our.text) != without_comments(their.text):
                said = ["not the same code"]
        elif our.kind == "table":
            table, other = cells(our.text), cells(their.text)
            if [len(row) for row in table] != [len(row) for row in other]:
                said = ["not the same rows and columns"]
            else:
                for cell, same in zip(chain(*table), chain(*other), strict=True):
                    said += prose_differences(cell, same)
        else:
            said = prose_differences(our.text, their.text)
        found += [f"line {their.line}: {text}" for text in said]
    return found


def faults(chinese: str) -> list[str]:
    """Where the page is not Chinese as it is written or shown: English left over, half-width punctuation, visible
    line breaks and asterisks."""
    found = []
    for block in blocks(chinese):
        if block.kind.startswith("code"):
            continue
        for part in chain(*cells(block.text)) if block.kind == "table" else [block.text]:
            text = CODE.sub("`", LINK.sub(r"\1", part)).replace("**", "")
            words = re.findall(r"[A-Za-z]{2,}", text)
            if len(words) > 3 and len(re.findall(f"[{HAN}]", text)) < len(words):
                found.append(f"line {block.line}: more English words than Chinese characters: {text[:40]}")
            for what, pattern in (
                ("English left", r"(?:[A-Za-z][A-Za-z'-]*,?\s+){5,}[A-Za-z]+"),
                # beside a character; "x1, y1" and "(n=300)" by themselves stay as they are
                ("half-width punctuation", rf'[{HAN}{FULL}]\s*[,;:!?("]|[,;:!?)"]\s*[{HAN}]|[{HAN}]\.(?!\w)'),
                # a renderer shows a line break as a space, which Chinese has neither between characters nor marks
                ("a visible line break", rf"[{HAN}{FULL}]\s*\n\s*[{HAN}{FULL}]|[{FULL}]\s*\n|\n\s*[{FULL}]"),
            ):
                if slip := re.search(pattern, text):
                    near = text[max(0, slip.start() - 8) : slip.end() + 8]
                    found.append(f"line {block.line}: {what}: {near!r}")
        # CommonMark: ** between a mark and a letter closes (or opens) nothing
        for before, bold, after in re.findall(r"(\w?)\*\*(.+?)\*\*(\w?)", block.text, re.DOTALL):
            if (before and not bold[0].isalnum()) or (after and not bold[-1].isalnum()):
                found.append(f"line {block.line}: asterisks stay visible: {before}**{bold}**{after}")
    return found


def links(page: Path) -> list[tuple[str, str]]:
    """(target, anchor) of the links outside code; a file as its path below ROOT."""
    prose = [b.text for b in blocks(page.read_text(encoding="utf-8")) if not b.kind.startswith("code")]
    found = []
    for _, address in LINK.findall(CODE.sub("`", "\n".join(prose))):
        target, _, anchor = address.partition("#")
        if "://" not in address:
            target = str(((page.parent / target) if target else page).resolve().relative_to(ROOT))
        found.append((target, anchor))
    return found


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = [b.text.lstrip("# ") for b in blocks(page.read_text(encoding="utf-8")) if b.kind[0] == "h"]
    return {re.sub(r"[^\w\- ]", "", LINK.sub(r"\1", text)).lower().replace(" ", "-") for text in headings}


@pytest.fixture(params=PAIRS, ids=lambda page: page.stem)
def pair(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """An English page and its Chinese one."""
    return request.param, PAIRS[request.param]


def test_every_page_is_there_in_both_languages() -> None:
    assert {page.name for page in (ROOT / "docs").glob("*.md")} == {p.name for p in (ROOT / "docs/zh").glob("*.md")}
    assert len(PAIRS) > 7


def test_both_languages_say_the_same(pair: tuple[Path, Path]) -> None:
    english, chinese = (page.read_text(encoding="utf-8") for page in pair)
    assert not differences(english, chinese)


def test_chinese_pages_are_chinese(pair: tuple[Path, Path]) -> None:
    assert not faults(pair[1].read_text(encoding="utf-8"))


def test_both_languages_link_to_one_another_at_the_top(pair: tuple[Path, Path]) -> None:
    for page, other in (pair, pair[::-1]):
        top = page.read_text(encoding="utf-8").partition("\n## ")[0]
        found = [(page.parent / address).resolve() for _, address in LINK.findall(top)]
        assert other in found, f"{page.name} does not link to {other.relative_to(ROOT)}"


def test_both_languages_have_the_same_links_each_to_its_own_language(pair: tuple[Path, Path]) -> None:
    names = {str(page.relative_to(ROOT)): str(other.relative_to(ROOT)) for page, other in PAIRS.items()}
    english, chinese = (str(page.relative_to(ROOT)) for page in pair)
    ours = Counter(names.get(target, target) for target, _ in links(pair[0]))
    theirs = Counter(target for target, _ in links(pair[1]))
    ours[chinese] -= 1  # the link to the other language
    theirs[english] -= 1
    assert +ours == +theirs


def test_links_and_their_anchors_are_there(pair: tuple[Path, Path]) -> None:
    for page in pair:
        for target, anchor in links(page):
            if "://" not in target:
                assert (ROOT / target).exists(), f"{page.name}: {target}"
                assert not anchor or anchor in anchors(ROOT / target), f"{page.name}: {target}#{anchor}"


PAGE = """# Memory

Loading takes 3.5 GB and two minutes; `--head int8` halves it ([more](more.md)).

- One of 7 million.

| part | size |
| --- | ---: |
| cache | 1.07 GB |

```sh
qvl-edge fit PATH  # before loading
```
"""
SAME = """# 内存

加载需要 3.5 GB 和 2 分钟；`--head int8`
使其减半（[更多](more.md)）。

- 700 万中的一个。

| 部分 | 大小 |
| --- | ---: |
| 缓存 | 1.07 GB |

```sh
qvl-edge fit PATH  # 加载之前
```
"""


def test_a_faithful_translation_has_no_differences() -> None:
    assert differences(PAGE, SAME) == [] and faults(SAME) == []


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        ("3.5 GB", "5.3 GB", "3.5 GB is in English only"),
        ("3.5 GB", "3.5 MB", "3.5 GB is in English only"),
        ("和 2 分钟", "和 3 分钟", "3 is in Chinese only"),
        ("700 万", "70 万", "7000000 is in English only"),
        ("1.07 GB |", "1.70 GB |", "1.07 GB is in English only"),
        ("| 缓存 | 1.07 GB |\n", "", "not the same rows and columns"),
        ("int8", "int4", "`--head int4` is in one language only"),
        ("fit PATH", "fit", "not the same code"),
        ("```sh", "```", "line 12 is code"),
        ("# 内存", "## 内存", "line 1 is h2"),
        ("- 700 万中的一个。\n\n", "", "line 6 is table"),
        ("加载之前\n```\n", "加载之前\n```\n还有一段。\n", "Chinese goes on at line 15"),
    ],
)
def test_differences_are_found(good: str, bad: str, said: str) -> None:
    assert good in SAME
    assert any(said in text for text in differences(PAGE, SAME.replace(good, bad)))


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        ("700 万中的一个。", "One of 7 million things here.", "more English words"),
        ("700 万中的一个。", "700 万中的一个，and this is what nobody has translated。", "English left"),
        ("分钟；", "分钟; ", "half-width"),
        ("一个。", "一个.", "half-width"),
        ("（[更多](more.md)）", " ([更多](more.md))", "half-width"),
        ("加载需要", "加载\n需要", "visible line break"),
        ("分钟；", "分钟；\n", "visible line break"),
        ("700 万中的一个。", "**700 万。**中的一个。", "asterisks"),
    ],
)
def test_faults_are_found(good: str, bad: str, said: str) -> None:
    assert good in SAME
    assert any(said in text for text in faults(SAME.replace(good, bad)))
