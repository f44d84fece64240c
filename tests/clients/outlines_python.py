"""outlines, over OpenAI's client and as a client of vLLM."""

from typing import Literal

import openai
import outlines
from outlines.inputs import Chat, Image
from PIL import Image as PILImage
from pydantic import BaseModel, Field
from scenario import MODEL, PICTURE, QUESTION, URL, found, passed, using

using("outlines", "openai")


class Count(BaseModel):
    """How many."""

    count: int = Field(ge=0, le=9)


client = openai.OpenAI(base_url=URL, api_key="none")
picture = PILImage.open(PICTURE)
for kind in (outlines.from_openai, outlines.from_vllm):
    model = kind(client, MODEL)
    assert model("hello", temperature=0)
    said = model([QUESTION, Image(picture)], temperature=0)
    found(said)
    chat = Chat([
        {"role": "user", "content": [QUESTION, Image(picture)]},
        {"role": "assistant", "content": said},
        {"role": "user", "content": QUESTION},
    ])  # fmt: skip
    found(model(chat, temperature=0))
    assert "".join(model.stream([QUESTION, Image(picture)], temperature=0)).strip() == said
    Count.model_validate_json(model("How many?", Count))
    passed(f"{kind.__name__}: text, picture, history, stream, structured output")
assert model("Yes or no?", Literal["yes", "no"]) in ("yes", "no")
assert model("A number?", outlines.regex(r"[0-9]{3}")).isdigit()
passed("from_vllm: choices and patterns")
