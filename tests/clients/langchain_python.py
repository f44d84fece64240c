"""langchain-openai."""

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from scenario import MODEL, QUESTION, URL, about_picture, found, passed, using

using("langchain-openai", "openai")
chat = ChatOpenAI(model=MODEL, base_url=URL, api_key="none", temperature=0)
assert chat.invoke("hello").content
passed("text")
asked = HumanMessage(about_picture()["content"])
said = chat.invoke([SystemMessage("Be brief."), asked])
found(said.content)
passed("picture")
assert "".join(chunk.content for chunk in chat.stream([SystemMessage("Be brief."), asked])) == said.content
passed("stream")
found(chat.invoke([asked, said, HumanMessage(QUESTION)]).content)
found(chat.invoke([asked, said, SystemMessage("Be exact."), HumanMessage(QUESTION)]).content)
passed("history, with a system message in it")


class Count(BaseModel):
    """How many."""

    count: int = Field(ge=0, le=9)


shaped = chat.with_structured_output(Count, method="json_schema").invoke("How many?")
assert isinstance(shaped, Count)
passed("structured output")
responses = ChatOpenAI(model=MODEL, base_url=URL, api_key="none", temperature=0, use_responses_api=True)
assert responses.invoke("hello").text
passed("responses")
