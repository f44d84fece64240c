"""guidance, over its model for OpenAI's client."""

import json

import guidance
from guidance import assistant, gen, image, user
from guidance import json as gen_json
from scenario import MODEL, PICTURE, QUESTION, SCHEMA, URL, found, passed, using

using("guidance", "openai")
model = guidance.models.OpenAI(MODEL, base_url=URL, api_key="none", echo=False)
with user():
    text = model + "hello"
with assistant():
    text += gen(name="said", max_tokens=20)
assert text["said"]
passed("text")
# it takes pictures for models of a certain name only, which the server has as another name of its model
eyes = guidance.models.OpenAI(f"gpt-4o-{MODEL}", base_url=URL, api_key="none", echo=False)
with user():
    shown = eyes + image(PICTURE) + QUESTION
with assistant():
    shown += gen(name="said", temperature=0)
found(shown["said"])
with user():
    shown += QUESTION
with assistant():
    shown += gen(name="again", temperature=0)
found(shown["again"])
passed("picture, history, stream")
with user():
    counted = model + "How many?"
with assistant():
    counted += gen_json(name="count", schema=SCHEMA)
assert set(json.loads(counted["count"])) == {"count"}
passed("structured output")
