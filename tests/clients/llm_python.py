"""The `llm` command's library."""

import json

import llm
from llm.default_plugins.openai_models import Chat
from scenario import MODEL, PICTURE, QUESTION, SCHEMA, URL, found, passed, using

using("llm", "openai")
model = Chat("qvl", model_name=MODEL, api_base=URL, key="none", vision=True, supports_schema=True)
assert model.prompt("hello", stream=False, temperature=0).text()
passed("text")
conversation = model.conversation()
picture = llm.Attachment(path=PICTURE)
said = conversation.prompt(QUESTION, attachments=[picture], stream=False, temperature=0).text()
found(said)
passed("picture")
found(conversation.prompt(QUESTION, stream=False, temperature=0).text())
passed("history")
assert "".join(model.prompt(QUESTION, attachments=[picture], stream=True, temperature=0)).strip() == said
passed("stream")
assert set(json.loads(model.prompt("How many?", schema=SCHEMA, stream=False).text())) == {"count"}
passed("structured output")
