// OpenAI's client for Node: node openai_node.mjs URL MODEL PICTURE
import { readFileSync } from "node:fs";
import assert from "node:assert";
import OpenAI from "openai";

const [url, model, picture] = process.argv.slice(2);
console.log(`using: openai ${JSON.parse(readFileSync("node_modules/openai/package.json")).version}`);
const client = new OpenAI({ baseURL: url, apiKey: "none" });
const data = `data:image/png;base64,${readFileSync(picture).toString("base64")}`;
const question = "Find the red diamond.";
const asked = { role: "user", content: [{ type: "text", text: question }, { type: "image_url", image_url: { url: data } }] };
const create = (fields) => client.chat.completions.create({ model, temperature: 0, ...fields });

const { message } = (await create({ messages: [asked] })).choices[0];
assert(message.content.includes("red diamond"));
console.log("passed: picture");
let text = "";
for await (const chunk of await create({ messages: [asked], stream: true })) text += chunk.choices[0]?.delta.content ?? "";
assert.equal(text, message.content);
console.log("passed: stream");
const again = await create({ messages: [asked, message, { role: "user", content: question }] });
assert(again.choices[0].message.content.includes("red diamond"));
console.log("passed: history");
const schema = { type: "object", properties: { count: { type: "integer", minimum: 0, maximum: 9 } }, required: ["count"] };
const response_format = { type: "json_schema", json_schema: { name: "n", schema, strict: true } };
const shaped = await create({ messages: [{ role: "user", content: "How many?" }], response_format });
assert.deepEqual(Object.keys(JSON.parse(shaped.choices[0].message.content)), ["count"]);
console.log("passed: structured output");
const response = await client.responses.create({ model, input: "hello", temperature: 0 });
assert(response.output_text);
console.log("passed: responses");
