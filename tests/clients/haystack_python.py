"""haystack."""

import json

from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage, ImageContent
from haystack.utils import Secret
from scenario import MODEL, PICTURE, QUESTION, SCHEMA, URL, found, passed, using

using("haystack-ai", "openai")


def generator(**options) -> OpenAIChatGenerator:
    settings = {"temperature": 0, **options}
    return OpenAIChatGenerator(Secret.from_token("none"), MODEL, api_base_url=URL, generation_kwargs=settings)


assert generator().run([ChatMessage.from_user("hello")])["replies"][0].text
passed("text")
asked = ChatMessage.from_user(content_parts=[QUESTION, ImageContent.from_file_path(PICTURE)])
(said,) = generator().run([asked])["replies"]
found(said.text)
passed("picture")
found(generator().run([asked, said, ChatMessage.from_user(QUESTION)])["replies"][0].text)
passed("history")
pieces = []
generator().run([asked], streaming_callback=lambda chunk: pieces.append(chunk.content))
assert "".join(pieces).strip() == said.text
passed("stream")
shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
(counted,) = generator(response_format=shape).run([ChatMessage.from_user("How many?")])["replies"]
assert set(json.loads(counted.text)) == {"count"}
passed("structured output")
