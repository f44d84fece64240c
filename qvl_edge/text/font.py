"""A font that can write a label: the one in fonts/, or one of this machine; never a download."""

import shutil
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

SHIPPED = Path(__file__).parent / "fonts" / "NotoSansCJKsc-subset.otf"  # GB 2312, Latin, punctuation: its README
FOLDERS = (  # where Linux, macOS and Windows keep fonts
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
    "C:/Windows/Fonts",
)
# beginnings of the names of fonts with many scripts: tried first, since every further font costs a file to open
WIDE = ("notosanscjk", "sourcehan", "wqy", "droidsansfallback", "unifont", "msyh", "simsun", "pingfang", "arial uni")
Run = tuple[str, ImageFont.FreeTypeFont]
"""A piece of text and the font that writes it."""
PROBE_SIZE = 20  # pixels; whether a glyph is there does not depend on it


def find_font(size: int, text: str = "", folders: tuple[str, ...] | None = None) -> ImageFont.FreeTypeFont:
    """A font of `size` pixels that has every character of `text`.

    That is the shipped one where it can; else the first that can in `folders` (default: what fontconfig names, then the
    usual FOLDERS); else the shipped one, which shows a box for what it lacks.
    """
    return _open(_font_for(text, folders) or SHIPPED, size)


def split_runs(text: str, size: int, folders: tuple[str, ...] | None = None) -> list[Run]:
    """`text` cut where the font changes: one font for all of it where there is one, else one for each character."""
    if _font_for(text, folders) is not None:
        return [(text, find_font(size, text, folders))]
    runs: list[Run] = []
    for character in text:
        font = find_font(size, character, folders)
        if runs and runs[-1][1] is font:
            runs[-1] = (runs[-1][0] + character, font)
        else:
            runs.append((character, font))
    return runs


def _font_for(text: str, folders: tuple[str, ...] | None) -> Path | None:
    """The font with all of `text`, if there is one."""
    missing = missing_glyphs(SHIPPED, text)
    if not missing:
        return SHIPPED
    return _machine_font("".join(sorted(set(text) - _blank(text))), "".join(sorted(missing)), folders)


def missing_glyphs(path: Path, text: str) -> set[str]:
    """Characters of `text` that the font at `path` has no glyph for."""
    font = _open(path, PROBE_SIZE)
    unknown = _bitmap(font, "\U0010ffff")  # never assigned: what a font draws for it, it draws for all it lacks
    return {character for character in set(text) - _blank(text) if _bitmap(font, character) == unknown}


def _blank(text: str) -> set[str]:
    return {character for character in text if character.isspace()}


def _bitmap(font: ImageFont.FreeTypeFont, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


@lru_cache(maxsize=32)
def _open(path: Path, size: int) -> ImageFont.FreeTypeFont:
    # the basic layout, so that a picture does not depend on whether Pillow was built with libraqm
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=256)
def _machine_font(text: str, missing: str, folders: tuple[str, ...] | None) -> Path | None:
    """The first font of this machine with all of `text`; `missing` are those of its characters that are rare."""
    tried = set()
    for path in (*_fontconfig(missing), *_installed(FOLDERS)) if folders is None else _installed(folders):
        if path in tried:
            continue
        tried.add(path)
        try:
            if not missing_glyphs(path, missing) and not missing_glyphs(path, text):
                return path
        except OSError:  # not a scalable font, or not readable
            continue
    return None


def _fontconfig(characters: str) -> Iterator[Path]:
    """Files that fontconfig lists for these characters; none where there is no fontconfig."""
    command = shutil.which("fc-list")
    if command is None:
        return
    pattern = ":charset=" + " ".join(f"{ord(character):x}" for character in characters)
    try:
        answer = subprocess.run([command, pattern, "file"], capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return
    lines = answer.stdout.decode(errors="surrogateescape").splitlines()
    yield from sorted((Path(line.strip().rstrip(":")) for line in lines), key=_rank)


def _installed(folders: tuple[str, ...]) -> list[Path]:
    """Font files in `folders` and below, those with many scripts first."""
    found: set[Path] = set()
    for name in folders:
        folder = Path(name).expanduser()
        if folder.is_dir():
            found.update(path for path in folder.rglob("*") if path.suffix.lower() in (".ttf", ".otf", ".ttc"))
    return sorted(found, key=_rank)


def _rank(path: Path) -> tuple[bool, bool, str]:
    name = path.name.lower()
    return not name.startswith(WIDE), "bold" in name, str(path)
