// Elements of the document. Whatever a model or a user wrote comes in as text (textContent), never as HTML.

import { t } from "./words.js";

export const $ = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const { data, label, ...rest } = properties;
  const made = Object.assign(document.createElement(tag), rest);
  Object.assign(made.dataset, data ?? {});
  if (label) made.setAttribute("aria-label", label);
  made.append(...children);
  return made;
}

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function button(word, action, className = "") {
  return element("button", { type: "button", textContent: t(word), onclick: action, className });
}

async function toClipboard(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const held = element("textarea", { value: text }); // over plain http from another machine there is no clipboard
  document.body.append(held);
  held.select();
  document.execCommand("copy");
  held.remove();
}

// A button that copies what `content` returns, and says so.
export function copyButton(word, content, className = "") {
  const made = button(word, async () => { await toClipboard(content()); made.textContent = t("copied"); }, className);
  return made;
}

export function download(name, blob) {
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

export function say(text, problem = false, ...more) {
  $("status").replaceChildren(text, ...more);
  $("status").classList.toggle("problem", problem);
}
