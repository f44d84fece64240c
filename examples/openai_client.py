"""Ask `qvl-edge serve BUNDLE` with OpenAI's client: python examples/openai_client.py IMAGE [http://127.0.0.1:8000/v1]

QVL_EDGE_API_KEY is the server's API key, if it has one.
"""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI


def main(image: str, base_url: str = "http://127.0.0.1:8000/v1") -> None:
    """A streamed question about an image; the last delta has the boxes."""
    client = OpenAI(base_url=base_url, api_key=os.environ.get("QVL_EDGE_API_KEY", "none"))
    data = base64.b64encode(Path(image).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": "Describe the picture with boxes."},
    ]
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], temperature=0, stream=True
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
            for box in getattr(choice.delta, "boxes", None) or []:
                print("\n", box["label"], box["pixels"], end="")
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
