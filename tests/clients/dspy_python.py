"""dspy."""

import json

import dspy
from scenario import MODEL, SCHEMA, URL, about_picture, found, passed, using

using("dspy", "litellm")
lm = dspy.LM(f"hosted_vllm/{MODEL}", api_base=URL, api_key="none", temperature=0, max_tokens=60, cache=False)
assert lm("hello")
passed("text")
(said,) = lm(messages=[about_picture()])
found(said if isinstance(said, str) else said["text"])
passed("picture")
answer = lm.forward(messages=[about_picture()]).choices[0].message.model_dump()
(again,) = lm(messages=[about_picture(), answer, {"role": "user", "content": "How many shapes?"}])
assert again if isinstance(again, str) else again["text"]
passed("history by model_dump()")
shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
(counted,) = lm(messages=[about_picture("How many shapes?")], response_format=shape)
assert set(json.loads(counted if isinstance(counted, str) else counted["text"])) == {"count"}
passed("structured output about a picture")
prediction = dspy.LM(f"text-completion-openai/{MODEL}", api_base=URL, api_key="none", model_type="text", cache=False)
assert prediction("Find the red", max_tokens=5)
passed("completions")
