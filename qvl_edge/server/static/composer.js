// The next question: its text and its pictures.

import { $, element, say } from "./dom.js";
import { read } from "./picture.js";
import { enlarge } from "./viewer.js";
import { t } from "./words.js";

const question = $("question");
let pending = []; // pictures of the next question

export function fit() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`;
}

export function fill(text, images = pending) {
  question.value = text;
  pending = images;
  fit();
  showPending();
  question.focus();
}

// Puts a region where the caret is; of several pictures, it says which one by the number that the model knows it by.
export function insert(region, index, count) {
  const text = count > 1 ? `Picture ${index + 1} ${region}` : region;
  const before = question.value.slice(0, question.selectionStart);
  question.setRangeText(before && !/\s$/.test(before) ? ` ${text} ` : `${text} `, question.selectionStart, question.selectionEnd, "end");
  fit();
  question.focus();
}

// The question as it is; it is gone from here then. Null if there is none.
export function take() {
  const text = question.value.trim(), images = pending;
  if (!text && !images.length) return null;
  fill("", []);
  return { text, images };
}

export async function add(files) {
  for (const file of files) {
    try {
      pending.push(await read(file));
      say("");
    } catch {
      say(`${file.name} ${t("noPicture")}`, true);
    }
  }
  showPending();
  question.focus();
}

export function showPending() {
  $("pictures").replaceChildren(...pending.map((image, index) => {
    const taken = (region) => insert(region, index, pending.length);
    const view = element("button", { type: "button", className: "thumb", title: t("mark"), label: `${t("mark")}: ${image.name}`, onclick: () => enlarge(image, { marking: true, taken }) });
    view.append(element("img", { src: image.url, alt: image.name }));
    const remove = element("button", { type: "button", className: "remove", textContent: "×", label: `${t("remove")}: ${image.name}` });
    remove.onclick = () => { pending = pending.filter((one) => one !== image); showPending(); };
    return element("li", {}, view, remove);
  }));
}

export function imagesOf(transfer) {
  const files = [...(transfer?.files ?? [])]; // a browser that does not know a format gives it no type
  return files.filter((file) => file.type.startsWith("image/") || (!file.type && /\.[a-z0-9]+$/i.test(file.name)));
}

export async function drop(transfer) {
  const images = imagesOf(transfer);
  const others = [...transfer.files].filter((file) => !images.includes(file)).map((file) => file.name);
  await add(images);
  if (others.length) say(`${others.join(", ")} ${t("noPicture")}`, true);
}
