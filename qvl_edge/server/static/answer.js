// A turn in the log: the question, and the card of its answer with pictures, boxes and their list.

import { coco, colours, moved, parts, regions, settled, tint } from "./boxes.js";
import { insert } from "./composer.js";
import { button, copyButton, element } from "./dom.js";
import { framed, save } from "./picture.js";
import { pointable } from "./pointing.js";
import { enlarge } from "./viewer.js";
import { t } from "./words.js";

const SIDE_BY_SIDE = 4; // pictures of a question that its answer shows all, so that they can be compared

// Whether later questions see the answer: one that was stopped or that failed is shown only.
export function complete({ answer }) { return Boolean(answer?.text && !answer.problem && answer.finish && answer.finish !== "stopped"); }

export function writeInto(target, scope, text, boxes) {
  const palette = colours(text, boxes);
  target.replaceChildren(...parts(text).map((part) => {
    if ("text" in part) return document.createTextNode(part.text);
    const phrase = element("button", { type: "button", className: "phrase", textContent: part.phrase || t("box") });
    return pointable(tint(phrase, palette.get(part.phrase)), scope, part.phrase);
  }));
}

// A picture that opens large when it is clicked or, by keyboard, through its button.
function openable(image, boxes, palette, scope, taken) {
  const stage = framed(image, boxes, palette, scope);
  const open = () => enlarge(image, { boxes, palette, taken });
  stage.addEventListener("click", open);
  stage.append(element("button", { type: "button", className: "enlarge", textContent: "⤢", title: t("enlarge"), label: `${t("enlarge")}: ${image.name}` }));
  return stage;
}

export function asked(turn) {
  const made = element("article", { className: "asked", label: t("you") }), text = element("p");
  const places = regions(turn.text, turn.images), palette = colours("", places);
  const count = turn.images.length;
  const stages = turn.images.map((image, index) => openable(image, places.filter((box) => box.image === index), palette, made, (region) => insert(region, index, count)));
  stages.forEach((stage, index) => { stage.querySelector("img").alt = `${t("picture")} ${index + 1}: ${turn.images[index].name}`; });
  writeInto(text, made, turn.text, places);
  made.append(element("div", { className: "thumbs" }, ...stages), text);
  return made;
}

// actions: {again, changed}, of the last turn and of any.
export function card(turn, { live, again, changed }) {
  const said = turn.answer, boxes = said.boxes.map((box, number) => ({ ...box, number: String(number) }));
  const made = element("article", { className: "answer", label: t("answer") }), text = element("div", { className: "said" });
  made.setAttribute("aria-busy", String(live));
  writeInto(text, made, live ? settled(said.text) : said.text, boxes);
  made.append(text);
  if (said.problem) made.append(element("p", { className: "problem", role: "alert", textContent: said.problem }));
  const palette = colours(said.text, boxes);
  if (boxes.length) made.append(element("div", { className: "seen" }, figures(turn, boxes, palette, made, changed), list(turn, boxes, palette, made)));
  if (!live) made.append(tools(turn, again));
  return made;
}

function figures(turn, boxes, palette, scope, changed) {
  const compared = turn.images.length <= SIDE_BY_SIDE ? turn.images : [];
  const shown = turn.sent.map((image, index) => ({ image, index, on: boxes.filter((box) => box.image === index) }));
  return element("div", { className: "figures" }, ...shown.filter(({ image, on }) => on.length || (compared.includes(image) && turn.images.length > 1)).map(({ image, index, on }) => {
    const number = turn.images.indexOf(image), taken = (region) => insert(region, number, number < 0 ? 1 : turn.images.length);
    const caption = element("figcaption", { className: "quiet" });
    if (turn.sent.length > 1) caption.append(element("span", { textContent: `${t("picture")} ${index + 1}: ${image.name}` }));
    if (on.length && turn.sent.length > 1) caption.append(button("move", () => { moveBoxes(turn, index); changed(); }, "move"));
    if (on.length) caption.append(button("save", () => save(image, on, palette), "save"));
    return element("figure", {}, openable(image, on, palette, scope, taken), caption);
  }));
}

// The model does not say which picture it means, and the latest one is taken; a reader may know better.
function moveBoxes(turn, index) {
  const next = (index + 1) % turn.sent.length;
  turn.answer.boxes = turn.answer.boxes.map((box) => (box.image === index ? moved(box, next, turn.sent[next]) : box));
}

function list(turn, boxes, palette, scope) {
  const rows = boxes.map((box) => {
    const name = box.label ?? "", [x1, y1, x2, y2] = box.pixels;
    const row = element("button", { type: "button" }, element("b", { textContent: name || t("box") }), element("span", { className: "quiet", textContent: `${x1}, ${y1} – ${x2}, ${y2}` }));
    return element("li", {}, pointable(tint(row, palette.get(name)), scope, name, box.number));
  });
  const head = element("div", { className: "row" }, element("span", { className: "quiet", textContent: `${t("boxCount")} ${boxes.length}` }),
    copyButton("copyJson", () => JSON.stringify(turn.answer.boxes), "json"), copyButton("copyCoco", () => JSON.stringify(coco(turn.sent, turn.answer.boxes)), "coco"));
  return element("section", { className: "boxes", label: t("boxes") }, head, element("ul", {}, ...rows));
}

function tools(turn, again) {
  const said = turn.answer, bar = element("div", { className: "tools" });
  if (said.text) bar.append(copyButton("copy", () => said.text, "copy"));
  if (again) bar.append(button("again", again, "again"));
  const facts = [];
  if (said.usage) facts.push(`${said.usage.completion_tokens} ${t("tokensWord")}`);
  if (said.rate) facts.push(`${said.rate.toFixed(said.rate < 10 ? 1 : 0)} ${t("perSecond")}`);
  if (said.first !== null) facts.push(`${t("first")} ${said.first.toFixed(2)} s`);
  if (said.finish === "stopped") facts.push(t("stopped"));
  if (said.text && !complete(turn)) facts.push(t("broken"));
  if (said.finish === "length") facts.push(t("cut"));
  bar.append(element("span", { className: "quiet", textContent: facts.join(" · ") }));
  return bar;
}
