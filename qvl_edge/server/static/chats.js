// The list of conversations that this browser keeps.

import { current, open } from "./chat.js";
import { $, button, element, say } from "./dom.js";
import { conversations, forget, keep, turnsOf } from "./store.js";
import { t } from "./words.js";

const narrow = matchMedia("(max-width: 900px)"); // as style.css: the list lies over the page there

export async function showList() {
  const heads = await conversations();
  $("chat-list").replaceChildren(...heads.map((head) => {
    const title = head.title || t("fresh");
    const enter = element("button", { type: "button", className: "enter", textContent: title, title, onclick: () => choose(head.id) });
    if (head.id === current().id) enter.setAttribute("aria-current", "true");
    const remove = element("button", { type: "button", className: "remove", textContent: "×", label: `${t("remove")}: ${title}`, onclick: () => removeChat(head) });
    return element("li", {}, enter, remove);
  }));
}

async function choose(id) {
  if (narrow.matches) toggleList(false);
  if (id !== current().id) open(id, await turnsOf(id));
  await showList();
}

export async function fresh() {
  if (narrow.matches) toggleList(false);
  open();
  await showList();
}

async function removeChat(head) {
  const turns = await turnsOf(head.id);
  await forget(head.id);
  if (head.id === current().id) { current().turns.length = 0; open(); }
  await showList();
  say(t("deleted"), false, " ", button("undo", async () => { await keep(head, turns); await choose(head.id); }));
}

export function toggleList(shown = $("chats").hidden) {
  $("chats").hidden = !shown;
  $("chats-toggle").setAttribute("aria-expanded", String(shown));
}

$("column").addEventListener("pointerdown", () => narrow.matches && toggleList(false));

narrow.addEventListener("change", () => toggleList(!narrow.matches));

// The list, and the conversation that this tab had.
export async function restore() {
  toggleList(!narrow.matches);
  const id = sessionStorage.getItem("qvl-edge.chat");
  const turns = id === null ? [] : await turnsOf(id);
  if (turns.length && !current().turns.length) open(id, turns);
  await showList();
}
