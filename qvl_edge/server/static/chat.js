// The conversation on the page: its turns, what is sent of them, and the answer that is being made.

import { asked, card, complete, writeInto } from "./answer.js";
import { parts, settled } from "./boxes.js";
import { fill } from "./composer.js";
import { $, button, download, say } from "./dom.js";
import { KeyNeeded, chunks, findModel, memory } from "./server.js";
import { forget, keep, settings } from "./store.js";
import { t } from "./words.js";

const MOST_IMAGES = 16; // of a request, as --max-images has it by default

const log = $("log"), scroller = document.querySelector("main");
let chat = fresh(); // {id, turns: [{text, images, sent, answer: null | {text, boxes, usage, first, rate, finish, problem}}]}
let running = null; // AbortController of the answer being made
let model = null;
let on = {}; // {keyNeeded, kept}, as app.js says

function fresh() { return { id: `${Date.now()}-${Math.random()}`, turns: [] }; }

export const current = () => chat;
export const isRunning = () => running !== null;

export function listen(calls) { on = calls; }

export async function connect() {
  try {
    model = await findModel();
    $("model").textContent = model.id;
    $("memory").textContent = await memory();
    say("");
    return true;
  } catch (error) {
    if (error instanceof KeyNeeded) on.keyNeeded();
    else say(error.message, true);
    return false;
  }
}

// ---------------------------------------------------------------- asking

function userMessage(turn) {
  const images = turn.images.map((image) => ({ type: "image_url", image_url: { url: image.url } }));
  return { role: "user", content: [...images, ...(turn.text ? [{ type: "text", text: turn.text }] : [])] };
}

function messages(turn) {
  const { system } = settings();
  const earlier = chat.turns.slice(0, chat.turns.indexOf(turn)).filter(complete);
  const pictures = () => [...earlier, turn].reduce((sum, one) => sum + one.images.length, 0);
  while (earlier.length && pictures() > MOST_IMAGES) { earlier.shift(); say(t("dropped")); }
  turn.sent = [...earlier, turn].flatMap((one) => one.images);
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...earlier.flatMap((one) => [userMessage(one), { role: "assistant", content: one.answer.text }]),
    userMessage(turn),
  ];
}

async function answer(turn) {
  const { system, ...sampling } = settings(), here = chat;
  for (const name of Object.keys(sampling)) sampling[name] = Number(sampling[name]);
  const said = (turn.answer = { text: "", boxes: [], usage: null, first: null, rate: null, finish: null, problem: null });
  const mine = (running = new AbortController());
  say(t("thinking"));
  show();
  const began = performance.now();
  let firstAt = null, lastAt = null;
  try {
    const sent = messages(turn);
    if (!model) await connect();
    const body = { model: model?.id ?? "", messages: sent, stream: true, stream_options: { include_usage: true }, ...sampling };
    for await (const chunk of chunks(body, mine.signal)) {
      if (chunk.usage) said.usage = chunk.usage;
      for (const { delta, finish_reason } of chunk.choices) {
        if (delta.content) {
          lastAt = performance.now();
          firstAt ??= lastAt;
          said.text += delta.content;
          if (here === chat) write(said);
        }
        if (finish_reason) said.finish = finish_reason;
        if (delta.boxes) said.boxes = delta.boxes;
      }
    }
    say(t("ready"));
  } catch (error) {
    if (error instanceof KeyNeeded) on.keyNeeded();
    if (error.name === "AbortError") { said.finish = "stopped"; say(t("stopped")); }
    else { said.problem = error.message; say(""); }
  }
  if (firstAt !== null) {
    said.first = (firstAt - began) / 1000;
    if (said.usage && lastAt > firstAt) said.rate = ((said.usage.completion_tokens - 1) * 1000) / (lastAt - firstAt);
  }
  said.text = said.text.trim();
  if (running === mine) running = null;
  show();
  await kept(here);
  if (!said.problem) $("memory").textContent = await memory();
}

export function send({ text, images }) {
  const turn = { text, images, sent: [], answer: null };
  chat.turns.push(turn);
  answer(turn);
}

export function stop() { running?.abort(); }

// ---------------------------------------------------------------- the conversation as a whole

async function kept(changed) {
  const [first] = changed.turns;
  if (!first) { await forget(changed.id); return on.kept(); } // edited away, or deleted while it was answered
  const words = parts(first?.text ?? "").map((part) => part.text ?? (part.phrase || "▢")).join("");
  const head = { id: changed.id, title: words.slice(0, 100) || first?.images[0]?.name || "", changed: Date.now() };
  if (changed === chat) sessionStorage.setItem("qvl-edge.chat", changed.id); // a reload of this tab opens it again
  if (!(await keep(head, changed.turns))) say(t("notKept"), true);
  on.kept();
}

// Another conversation, or an empty one; an answer that is being made ends.
export function open(id, turns) {
  stop();
  running = null;
  chat = id === undefined ? fresh() : { id, turns };
  sessionStorage.setItem("qvl-edge.chat", chat.id);
  say("");
  show();
  toBottom();
}

// The last question goes back to where it was written, with its pictures; its answer goes.
function edit(turn) {
  chat.turns.pop();
  show();
  kept(chat);
  fill(turn.text, turn.images);
}

// The messages are as the API takes them, so the file can be sent to a server again.
export function exportChat() {
  const { system, ...sampling } = settings();
  const whole = chat.turns.filter((turn) => complete(turn) || turn === chat.turns.at(-1)).flatMap((turn) => [
    userMessage(turn),
    ...(complete(turn) ? [{ role: "assistant", content: turn.answer.text, boxes: turn.answer.boxes }] : []),
  ]);
  if (system) whole.unshift({ role: "system", content: system });
  const file = { model: model?.id, exported: new Date().toISOString(), sampling, messages: whole };
  download("conversation.json", new Blob([JSON.stringify(file, null, 2)], { type: "application/json" }));
}

// ---------------------------------------------------------------- showing

export function show() {
  const follow = atBottom(), last = chat.turns.at(-1);
  log.replaceChildren(...chat.turns.flatMap((turn) => {
    const question = asked(turn);
    if (turn === last && !running) question.append(button("edit", () => edit(turn), "edit"));
    if (!turn.answer) return [question];
    const again = turn === last ? () => running || answer(turn) : null;
    return [question, card(turn, { live: running !== null && turn === last, again, changed: () => { show(); kept(chat); } })];
  }));
  $("welcome").hidden = chat.turns.length > 0;
  $("export").disabled = !chat.turns.length || running !== null;
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  if (follow) toBottom();
}

// One more piece of the answer that grows: only its text is drawn anew.
function write(said) {
  const follow = atBottom(), made = log.lastElementChild;
  writeInto(made.querySelector(".said"), made, settled(said.text), []);
  if (follow) toBottom();
}

function atBottom() { return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 120; }
function toBottom() { scroller.scrollTop = scroller.scrollHeight; }
