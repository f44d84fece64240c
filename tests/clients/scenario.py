"""What every client is asked to do, and the picture for it; needs the standard library only. The scripts of this
folder run in environments of their own, one client in each.

A script is run as `python tests/clients/NAME.py http://127.0.0.1:8000/v1 MODEL PICTURE`. It prints the version of its
client and a line for every case that passed, and fails by an assertion.
"""

import base64
import sys
from importlib import metadata
from pathlib import Path

QUESTION = "Find the red diamond."  # of the picture, which has one
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["count"],
}
URL, MODEL, PICTURE = sys.argv[1:] if len(sys.argv) == 4 else ("", "", "")
DATA_URI = "data:image/png;base64," + base64.b64encode(Path(PICTURE).read_bytes()).decode() if PICTURE else ""


def about_picture(question: str = QUESTION) -> dict:
    """A user's message with the picture."""
    image = {"type": "image_url", "image_url": {"url": DATA_URI}}
    return {"role": "user", "content": [{"type": "text", "text": question}, image]}


def found(text: str) -> None:
    """Whether an answer names the diamond."""
    assert "red diamond" in text and "<box>" in text, text


def passed(case: str) -> None:
    """Say so."""
    print(f"passed: {case}", flush=True)


def using(*packages: str) -> None:
    """Say which versions."""
    print("using:", ", ".join(f"{name} {metadata.version(name)}" for name in packages), flush=True)
