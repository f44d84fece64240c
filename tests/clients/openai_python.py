"""OpenAI's own client."""

import json

from openai import NotFoundError, OpenAI
from scenario import MODEL, QUESTION, SCHEMA, URL, about_picture, found, passed, using

using("openai")
client = OpenAI(base_url=URL, api_key="none")
create = client.chat.completions.create
greedy = {"model": MODEL, "temperature": 0}

first = create(messages=[{"role": "user", "content": "hello"}], **greedy)
assert first.choices[0].message.content and first.system_fingerprint
passed("text")
said = create(messages=[about_picture()], **greedy).choices[0].message
found(said.content)
passed("picture")
chunks = list(create(messages=[about_picture()], stream=True, stream_options={"include_usage": True}, **greedy))
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == said.content and chunks[-1].usage
passed("stream")
history = [about_picture(), said.model_dump(), {"role": "user", "content": QUESTION}]
found(create(messages=history, **greedy).choices[0].message.content)
passed("history by model_dump()")
shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
shaped = create(messages=[about_picture("How many shapes?")], response_format=shape, **greedy).choices[0].message
assert set(json.loads(shaped.content)) == {"count"}
passed("structured output")
response = client.responses.create(input="hello", **greedy)
assert response.output_text == first.choices[0].message.content
again = client.responses.create(input=[*response.output, {"role": "user", "content": "hello"}], **greedy)
assert again.output_text
passed("responses, and their output as history")
assert client.completions.create(prompt="Find the red", max_tokens=5, **greedy).choices[0].text
passed("completions")
try:
    create(model="gpt-4o", messages=[{"role": "user", "content": "hello"}])
    raise AssertionError
except NotFoundError:
    passed("an unknown model is NotFoundError")
