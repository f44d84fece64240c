"""instructor, with the schema as response_format."""

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field
from scenario import MODEL, PICTURE, URL, about_picture, passed, using

using("instructor", "openai")


class Count(BaseModel):
    """How many."""

    count: int = Field(ge=0, le=9)


client = instructor.from_openai(OpenAI(base_url=URL, api_key="none"), mode=instructor.Mode.JSON_SCHEMA)
asked = {"model": MODEL, "response_model": Count, "temperature": 0, "max_retries": 0}
create = client.chat.completions.create
assert isinstance(create(messages=[{"role": "user", "content": "How many?"}], **asked), Count)
passed("text")
assert isinstance(create(messages=[about_picture("How many shapes?")], **asked), Count)
image = instructor.Image.from_path(PICTURE)
assert isinstance(create(messages=[{"role": "user", "content": ["How many shapes?", image]}], **asked), Count)
passed("picture")
answer, raw = client.chat.completions.create_with_completion(messages=[about_picture("How many?")], **asked)
history = [about_picture("How many?"), raw.choices[0].message.model_dump()]
assert isinstance(create(messages=[*history, {"role": "user", "content": "How many circles?"}], **asked), Count)
passed("history by model_dump()")
parts = list(client.chat.completions.create_partial(messages=[{"role": "user", "content": "How many?"}], **asked))
assert isinstance(parts[-1].count, int)
passed("stream")
