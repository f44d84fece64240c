// The page's controls. Its parts: chat.js (what is asked and answered), answer.js (how a turn looks), composer.js (the
// next question), chats.js (the list), viewer.js (a picture, large), picture.js, boxes.js, store.js, server.js, words.js.

import { connect, exportChat, isRunning, listen, send, show, stop } from "./chat.js";
import { fresh, restore, showList, toggleList } from "./chats.js";
import { add, drop, fill, fit, imagesOf, showPending, take } from "./composer.js";
import { $, element } from "./dom.js";
import { key, setKey } from "./server.js";
import { store, stored } from "./store.js";
import { isChinese, speak, switchLanguage, t } from "./words.js";

const question = $("question"), panel = $("panel");

function submit() {
  const asked = isRunning() ? null : take();
  if (asked) send(asked);
}

function speakAll() {
  speak();
  $("language").textContent = isChinese() ? "English" : "中文";
  $("language").lang = isChinese() ? "en" : "zh";
  $("ideas").replaceChildren(...t("ideas").map((idea) => element("button", { type: "button", textContent: idea, onclick: () => fill(idea) })));
  showPending();
  showList();
  show();
}

const dark = matchMedia("(prefers-color-scheme: dark)");
function applyTheme() { document.documentElement.dataset.theme = stored("theme") ?? (dark.matches ? "dark" : "light"); }

async function start() {
  if (await connect()) $("key-note").hidden = true;
}

listen({
  kept: showList,
  keyNeeded: () => {
    $("key-note").hidden = false;
    if (!panel.open) panel.showModal();
    $("key").focus();
  },
});
$("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
question.addEventListener("input", fit);
question.addEventListener("keydown", (event) => {
  // Enter that ends the composing of a Chinese word must not send
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
});
addEventListener("keydown", (event) => { if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop(); });
$("stop").onclick = stop;
$("new").onclick = async () => { await fresh(); question.focus(); };
$("chats-toggle").onclick = () => toggleList();
$("export").onclick = exportChat;
$("language").onclick = () => { switchLanguage(); speakAll(); };
$("theme").onclick = () => { store("theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark"); applyTheme(); };
dark.addEventListener("change", applyTheme);
$("settings").onclick = () => panel.showModal();
panel.addEventListener("close", () => {
  const fields = panel.querySelectorAll("[name]");
  store("settings", JSON.stringify(Object.fromEntries([...fields].map((field) => [field.name, field.value.trim()]))));
  setKey($("key").value.trim());
  start();
});
$("files").addEventListener("change", (event) => { add([...event.target.files]); event.target.value = ""; });
addEventListener("paste", (event) => { const files = imagesOf(event.clipboardData); if (files.length) { event.preventDefault(); add(files); } });
addEventListener("dragover", (event) => { event.preventDefault(); $("drop").hidden = false; });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
addEventListener("drop", (event) => { event.preventDefault(); $("drop").hidden = true; drop(event.dataTransfer); });

const kept = JSON.parse(stored("settings") ?? "{}");
for (const field of panel.querySelectorAll("[name]")) field.value = kept[field.name] ?? "";
$("key").value = key();
applyTheme();
speakAll();
restore();
start();
