// Vercel's AI SDK, over chat completions and over responses: node ai_sdk_node.mjs URL MODEL PICTURE
import { readFileSync } from "node:fs";
import assert from "node:assert";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText } from "ai";
import { z } from "zod";

const [baseURL, name, picture] = process.argv.slice(2);
const versions = ["ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible"].map((p) => `${p} ${JSON.parse(readFileSync(`node_modules/${p}/package.json`)).version}`);
console.log(`using: ${versions.join(", ")}`);
const question = "Find the red diamond.";
const content = [{ type: "text", text: question }, { type: "image", image: readFileSync(picture), mediaType: "image/png" }];
const asked = { role: "user", content };
const compatible = createOpenAICompatible({ name: "qvl", baseURL, apiKey: "none", supportsStructuredOutputs: true });
const openai = createOpenAI({ baseURL, apiKey: "none" });
const providerOptions = { openai: { store: false } }; // nothing is kept here, so history is sent and not referred to
for (const [kind, model] of [["compatible", compatible(name)], ["chat", openai.chat(name)], ["responses", openai.responses(name)]]) {
  const said = await generateText({ model, providerOptions, temperature: 0, messages: [asked] });
  assert(said.text.includes("red diamond"), said.text);
  const history = [asked, ...said.response.messages, { role: "user", content: question }];
  const again = await generateText({ model, providerOptions, temperature: 0, messages: history });
  assert(again.text.includes("red diamond"), again.text);
  let text = "";
  for await (const piece of streamText({ model, providerOptions, temperature: 0, messages: [asked] }).textStream) text += piece;
  assert.equal(text.trim(), said.text.trim());
  const schema = z.object({ count: z.number().int().min(0).max(9) });
  const shaped = await generateText({ model, providerOptions, prompt: "How many?", output: Output.object({ schema }) });
  assert.deepEqual(Object.keys(shaped.output), ["count"]);
  console.log(`passed: ${kind}: picture, history, stream, structured output`);
}
