"""The web page's files, by the paths they are served under."""

from pathlib import Path

KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
FILES = {
    "/" if file.name == "index.html" else f"/{file.name}": file
    for file in sorted(Path(__file__).with_name("static").iterdir())
    if file.suffix in KINDS
}
