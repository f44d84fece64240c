"""litellm under the five providers that speak to an OpenAI-compatible server."""

import json

import litellm
from scenario import MODEL, QUESTION, SCHEMA, URL, about_picture, found, passed, using

using("litellm")
for provider in ("openai", "hosted_vllm", "lm_studio", "litellm_proxy", "custom_openai"):
    asked = {"model": f"{provider}/{MODEL}", "api_base": URL, "api_key": "none", "temperature": 0}
    message = litellm.completion(messages=[about_picture()], **asked).choices[0].message
    found(message.content)
    history = [about_picture(), message.model_dump(), {"role": "user", "content": QUESTION}]
    found(litellm.completion(messages=history, **asked).choices[0].message.content)
    history[1] = message  # as its documentation does
    found(litellm.completion(messages=history, **asked).choices[0].message.content)
    chunks = litellm.completion(messages=[about_picture()], stream=True, **asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    shaped = litellm.completion(messages=[about_picture("How many shapes?")], response_format=shape, **asked)
    assert set(json.loads(shaped.choices[0].message.content)) == {"count"}
    passed(f"{provider}: picture, second turn, stream, structured output")
try:
    litellm.completion(messages=[{"role": "user", "content": "word " * 9000}], **asked)
    raise AssertionError
except litellm.ContextWindowExceededError:
    passed("a prompt that is too long is ContextWindowExceededError")
