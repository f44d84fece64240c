"""llama-index."""

from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field
from scenario import MODEL, PICTURE, QUESTION, URL, found, passed, using

using("llama-index-llms-openai-like", "openai")
model = OpenAILike(model=MODEL, api_base=URL, api_key="none", is_chat_model=True, temperature=0, context_window=8192)
assert str(model.complete("hello"))
passed("text")
asked = ChatMessage(role="user", blocks=[ImageBlock(path=PICTURE), TextBlock(text=QUESTION)])
said = model.chat([asked])
found(said.message.content)
passed("picture")
assert list(model.stream_chat([asked]))[-1].message.content.strip() == said.message.content
passed("stream")
found(model.chat([asked, said.message, ChatMessage(role="user", content=QUESTION)]).message.content)
passed("history")


class Count(BaseModel):
    """How many."""

    count: int = Field(ge=0, le=9)


shape = {"type": "json_schema", "json_schema": {"name": "Count", "schema": Count.model_json_schema()}}
Count.model_validate_json(model.complete("How many?", response_format=shape).text)
passed("structured output")
plain = OpenAILike(model=MODEL, api_base=URL, api_key="none", is_chat_model=False, max_tokens=5, context_window=8192)
assert str(plain.complete("Find the red"))
passed("completions")
