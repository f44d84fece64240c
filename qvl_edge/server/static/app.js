// The page: a conversation kept in memory, sent whole with every question to /v1/chat/completions of this server.
// Whatever the model or a user wrote reaches the document as text only (textContent), never as HTML.

const WORDS = {
  en: {
    skip: "To the question", theme: "Light or dark", export: "Export", clear: "Clear", settings: "Settings",
    welcome: "Ask about your pictures", welcomeMore: "Drop, paste or choose pictures, then ask. What the answer names is framed in the picture. Pictures go to this server only.",
    ideas: ["Describe the picture with boxes.", "What number is printed?", "Find the red circle."],
    log: "Conversation", pictures: "Pictures of the next question", attach: "Add pictures", question: "Your question", send: "Send", stop: "Stop",
    drop: "Drop the pictures here", settingsMore: "Empty fields are the model's own settings.", system: "System message", temperature: "Temperature (0: greedy)",
    penalty: "Repetition penalty", tokens: "Longest answer (tokens)", seed: "Seed", key: "API key (kept until this tab closes)", keyNeeded: "This server needs an API key.", done: "Done",
    you: "You", answer: "Answer", copy: "Copy", copied: "Copied", again: "Regenerate", save: "Save picture", remove: "Remove", picture: "Picture", box: "box",
    stopped: "stopped", cut: "cut at the token limit", noPicture: "is not a picture that can be shown in this browser; save it as JPEG or PNG.", tokensWord: "tokens", perSecond: "tokens/s", first: "first after", thinking: "Answering …", ready: "Answer complete", edit: "Edit", move: "Boxes to the next picture", copyBoxes: "Copy boxes", broken: "broken off: later questions do not see it", dropped: "The oldest turns were left out: one request has at most 16 pictures.", offline: "The server cannot be reached.", ended: "The answer ended early.",
  },
  zh: {
    skip: "跳到问题", theme: "浅色或深色", export: "导出", clear: "清空", settings: "设置",
    welcome: "就图片提问", welcomeMore: "拖入、粘贴或选择图片，然后提问。回答中提到的物体会在图上框出。图片只发送到本服务器。",
    ideas: ["描述这张图并框出图形。", "印着什么数字？", "框出红色圆形。"],
    log: "对话", pictures: "下一个问题的图片", attach: "添加图片", question: "您的问题", send: "发送", stop: "停止",
    drop: "把图片拖到这里", settingsMore: "留空则使用模型自己的设置。", system: "系统消息", temperature: "温度（0 为贪心）",
    penalty: "重复惩罚", tokens: "回答最大长度（token）", seed: "随机种子", key: "API 密钥（关闭标签页即清除）", keyNeeded: "本服务器需要 API 密钥。", done: "完成",
    you: "您", answer: "回答", copy: "复制", copied: "已复制", again: "重新生成", save: "保存图片", remove: "移除", picture: "图片", box: "框",
    stopped: "已停止", cut: "达到长度上限", noPicture: "不是本浏览器能显示的图片，请另存为 JPEG 或 PNG。", tokensWord: "token", perSecond: "token/秒", first: "首字", thinking: "正在回答……", ready: "回答完成", edit: "编辑", move: "框移到下一张图", copyBoxes: "复制框", broken: "未完成：后续提问不包含它", dropped: "已略去最早的几轮：每次请求最多 16 张图片。", offline: "无法连接服务器。", ended: "回答提前中断。",
  },
};
// as qvl_edge/text/draw.py, so that the page and `--draw` colour alike
const PALETTE = ["#e6194b", "#0082ff", "#3cb44b", "#ffd700", "#911eb4", "#f58230", "#00c8c8", "#f032e6", "#800000", "#0000a0", "#beff3c", "#785514"];
const DARK_INK = new Set(["#ffd700", "#f58230", "#00c8c8", "#beff3c", "#3cb44b"]);

const $ = (id) => document.getElementById(id);
const log = $("log"), question = $("question"), panel = $("panel");
const turns = []; // {text, images, sent, answer: null | {text, boxes, usage, first, rate, finish, problem}}
let pending = []; // images of the next question: {name, url, width, height}
let running = null; // AbortController of the answer being made
let model = null;
let language = stored("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
const t = (name) => WORDS[language][name];

function stored(name) { return localStorage.getItem(`qvl-edge.${name}`); }
function store(name, value) { localStorage.setItem(`qvl-edge.${name}`, value); }

function element(tag, properties = {}, ...children) {
  const { data, ...rest } = properties;
  const made = Object.assign(document.createElement(tag), rest);
  Object.assign(made.dataset, data ?? {});
  made.append(...children);
  return made;
}

function button(word, action, className = "") {
  return element("button", { type: "button", textContent: t(word), onclick: action, className });
}

// ---------------------------------------------------------------- the server

function headers() {
  const key = sessionStorage.getItem("qvl-edge.key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function problemOf(response) {
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `HTTP ${response.status}`;
}

async function findModel() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (response.status === 401) return askForKey();
    if (!response.ok) throw new Error(await problemOf(response));
    model = (await response.json()).data[0];
    $("model").textContent = model.id;
    $("key-note").hidden = true;
    say("");
  } catch (error) {
    say(error instanceof TypeError ? t("offline") : error.message, true);
  }
}

function askForKey() {
  $("key-note").hidden = false;
  if (!panel.open) panel.showModal();
  $("key").focus();
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    let end;
    while ((end = held.indexOf("\n\n")) >= 0) {
      const line = held.slice(0, end);
      held = held.slice(end + 2);
      if (line.startsWith("data: ")) yield line.slice(6);
    }
  }
}

// ---------------------------------------------------------------- asking

function settings() {
  const given = JSON.parse(stored("settings") ?? "{}");
  return Object.fromEntries(Object.entries(given).filter(([, value]) => value !== ""));
}

function userMessage(turn) {
  const images = turn.images.map((image) => ({ type: "image_url", image_url: { url: image.url } }));
  return { role: "user", content: [...images, ...(turn.text ? [{ type: "text", text: turn.text }] : [])] };
}

// An answer that was stopped or that failed is shown, and is no part of what the model sees next.
function complete(turn) { return Boolean(turn.answer?.text && !turn.answer.problem && turn.answer.finish !== "stopped" && turn.answer.finish); }

function conversation(turn) {
  const { system } = settings();
  const earlier = turns.slice(0, turns.indexOf(turn)).filter(complete);
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
  const { system, ...sampling } = settings();
  for (const name of Object.keys(sampling)) sampling[name] = Number(sampling[name]);
  const said = (turn.answer = { text: "", boxes: [], usage: null, first: null, rate: null, finish: null, problem: null });
  running = new AbortController();
  say(t("thinking"));
  show();
  const began = performance.now();
  let firstAt = null, lastAt = null;
  try {
    if (!model) await findModel();
    const body = { model: model?.id ?? "", messages: conversation(turn), stream: true, stream_options: { include_usage: true }, ...sampling };
    const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal });
    if (response.status === 401) askForKey();
    if (!response.ok) throw new Error(await problemOf(response));
    let ended = false;
    for await (const data of events(response)) {
      if (data === "[DONE]") { ended = true; break; }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) said.usage = chunk.usage;
      for (const { delta, finish_reason } of chunk.choices) {
        if (delta.content) {
          lastAt = performance.now();
          firstAt ??= lastAt;
          said.text += delta.content;
          write(turn);
        }
        if (finish_reason) said.finish = finish_reason;
        if (delta.boxes) said.boxes = delta.boxes;
      }
    }
    if (!ended) throw new Error(t("ended"));
    say(t("ready"));
  } catch (error) {
    if (error.name === "AbortError") { said.finish = "stopped"; say(t("stopped")); }
    else { said.problem = error instanceof TypeError ? t("offline") : error.message; say(""); }
  }
  if (firstAt !== null) {
    said.first = (firstAt - began) / 1000;
    if (said.usage && lastAt > firstAt) said.rate = ((said.usage.completion_tokens - 1) * 1000) / (lastAt - firstAt);
  }
  said.text = said.text.trim();
  running = null;
  show();
  keep();
}

function send() {
  const text = question.value.trim();
  if (running || (!text && !pending.length)) return;
  const turn = { text, images: pending, answer: null };
  turns.push(turn);
  pending = [];
  question.value = "";
  fit();
  showPending();
  answer(turn);
}

// The last question goes back to where it was written, with its pictures; its answer goes.
function edit(turn) {
  turns.pop();
  pending = turn.images;
  question.value = turn.text;
  fit();
  showPending();
  show();
  keep();
  question.focus();
}

// ---------------------------------------------------------------- keeping

// The conversation stays in this browser, pictures too, which are too large for localStorage.
function storage(mode, act) {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open("qvl-edge", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("kept");
    opening.onerror = () => reject(opening.error);
    opening.onsuccess = () => {
      const request = act(opening.result.transaction("kept", mode).objectStore("kept"));
      request.onsuccess = () => { resolve(request.result); opening.result.close(); };
      request.onerror = () => reject(request.error);
    };
  });
}

function keep() { return storage("readwrite", (store) => store.put(turns, "turns")).catch(() => {}); } // a private window has none

async function restore() {
  const kept = await storage("readonly", (store) => store.get("turns")).catch(() => null);
  if (!kept?.length || turns.length) return;
  for (const turn of kept) turns.push({ ...turn, sent: turn.sent ?? [] });
  show();
}

// ---------------------------------------------------------------- showing

const MARKUP = /<ref>((?:(?!<\/?(?:ref|box|quad)>)[^])*)<\/ref>|<(box|quad)>[^<]*<\/\2>/g;

// Text between marks, phrases, and boxes that have no phrase before them.
function parts(text) {
  const found = [];
  let end = 0, phraseEnd = -1;
  for (const match of text.matchAll(MARKUP)) {
    if (match.index > end) found.push({ text: text.slice(end, match.index) });
    end = match.index + match[0].length;
    if (match[1] !== undefined) { found.push({ phrase: match[1].trim() }); phraseEnd = end; }
    else if (match.index === phraseEnd) phraseEnd = end;
    else found.push({ phrase: "" });
  }
  if (end < text.length) found.push({ text: text.slice(end) });
  return found;
}

// While an answer grows, a mark that is not complete yet is left out.
function settled(text) {
  return text.replace(/<(box|quad)>[^<]*(<[^>]*)?$/, "").replace(/<ref>((?:(?!<\/ref>)[^])*)$/, "$1").replace(/<\/?[a-z]*$/, "");
}

function colours(text, boxes) {
  const names = [...boxes.map((box) => box.label ?? ""), ...parts(text).filter((part) => "phrase" in part).map((part) => part.phrase)];
  return new Map([...new Set(names)].map((name, index) => [name, PALETTE[index % PALETTE.length]]));
}

function tint(node, colour) {
  node.style.setProperty("--colour", colour);
  node.style.setProperty("--ink", DARK_INK.has(colour) ? "#000" : "#fff");
  return node;
}

// Everything of one name in one answer lights up together.
function point(card, name) {
  card.classList.toggle("pointing", name !== null);
  for (const node of card.querySelectorAll("[data-name]")) node.classList.toggle("lit", node.dataset.name === name);
}

function pointable(node, card, name) {
  node.dataset.name = name;
  node.addEventListener("pointerenter", () => point(card, name));
  node.addEventListener("pointerleave", () => point(card, null));
  node.addEventListener("focus", () => point(card, name));
  node.addEventListener("blur", () => point(card, null));
  return node;
}

function writeInto(target, card, text, boxes) {
  const palette = colours(text, boxes);
  target.replaceChildren(...parts(text).map((part) => {
    if ("text" in part) return document.createTextNode(part.text);
    const phrase = element("button", { type: "button", className: "phrase", textContent: part.phrase || t("box") });
    return pointable(tint(phrase, palette.get(part.phrase)), card, part.phrase);
  }));
}

function corners(box) {
  const [x1, y1, x2, y2] = box.pixels;
  return box.quad_pixels ?? [[x1, y1], [x2, y1], [x2, y2], [x1, y2]];
}

function picture(image, boxes, card, palette) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${image.width} ${image.height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const stage = element("div", { className: "stage" }, element("img", { src: image.url, alt: image.name, width: image.width, height: image.height }), svg);
  const area = ({ pixels: [x1, y1, x2, y2] }) => (x2 - x1) * (y2 - y1);
  for (const box of [...boxes].sort((one, other) => area(other) - area(one))) { // large ones first: none hides a small one
    const name = box.label ?? "";
    const shape = document.createElementNS(svg.namespaceURI, "polygon");
    shape.setAttribute("points", corners(box).join(" "));
    svg.append(pointable(tint(shape, palette.get(name)), card, name));
    if (!name) continue;
    const tag = tint(element("span", { className: "name", textContent: name, data: { name } }), palette.get(name));
    const [x1, y1, x2] = box.pixels;
    const right = x1 > image.width * 0.6; // from the right edge leftwards, where there is more room
    Object.assign(tag.style, right ? { right: `${100 - (x2 / image.width) * 100}%` } : { left: `${(x1 / image.width) * 100}%` });
    Object.assign(tag.style, { top: `${(y1 / image.height) * 100}%`, transform: y1 > image.height * 0.08 ? "translateY(-100%)" : "" });
    stage.append(tag);
  }
  return element("figure", {}, stage);
}

function card(turn) {
  const said = turn.answer;
  const made = element("article", { className: "answer" });
  made.setAttribute("aria-label", t("answer"));
  made.setAttribute("aria-busy", String(running !== null && turn === turns.at(-1)));
  const text = element("div", { className: "said" });
  made.append(text);
  const live = made.getAttribute("aria-busy") === "true";
  writeInto(text, made, live ? settled(said.text) : said.text, said.boxes);
  if (said.problem) made.append(element("p", { className: "problem", role: "alert", textContent: said.problem }));
  const palette = colours(said.text, said.boxes);
  const saves = [];
  for (const index of [...new Set(said.boxes.map((box) => box.image))]) {
    const image = turn.sent[index], boxes = said.boxes.filter((box) => box.image === index);
    if (!image) continue;
    const figure = picture(image, boxes, made, palette);
    if (turn.sent.length > 1) figure.append(element("figcaption", { className: "quiet" }, `${t("picture")} ${index + 1}: ${image.name} `, button("move", () => moveBoxes(turn, index), "move")));
    made.append(figure);
    saves.push(button("save", () => savePicture(image, boxes, palette), "save"));
  }
  if (!live) made.append(tools(turn, saves));
  return made;
}

// The model does not say which picture it means, and the latest one is taken; a reader may know better.
function moveBoxes(turn, index) {
  const next = (index + 1) % turn.sent.length, { width, height } = turn.sent[next];
  const scaled = (x, y) => [Math.floor((x / 1000) * width), Math.floor((y / 1000) * height)];
  for (const box of turn.answer.boxes.filter((one) => one.image === index)) {
    const [x1, y1, x2, y2] = box.corners;
    Object.assign(box, { image: next, pixels: [...scaled(x1, y1), ...scaled(x2, y2)] });
    if (box.quad) box.quad_pixels = box.quad.map(([x, y]) => scaled(x, y));
  }
  show();
  keep();
}

function tools(turn, saves) {
  const said = turn.answer;
  const bar = element("div", { className: "tools" });
  if (said.text) {
    const copy = button("copy", async () => { await navigator.clipboard.writeText(said.text); copy.textContent = t("copied"); });
    bar.append(copy);
  }
  if (turn === turns.at(-1)) bar.append(button("again", () => running || answer(turn), "again"));
  if (said.boxes.length) {
    const copy = button("copyBoxes", async () => { await navigator.clipboard.writeText(JSON.stringify(said.boxes)); copy.textContent = t("copied"); });
    bar.append(copy);
  }
  bar.append(...saves);
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

function show() {
  const follow = atBottom();
  log.replaceChildren(...turns.flatMap((turn) => {
    const thumbs = turn.images.map((image, index) => element("img", { src: image.url, alt: `${t("picture")} ${index + 1}: ${image.name}` }));
    const asked = element("article", { className: "asked" }, element("div", { className: "thumbs" }, ...thumbs), element("p", { textContent: turn.text }));
    asked.setAttribute("aria-label", t("you"));
    if (turn === turns.at(-1) && !running) asked.append(button("edit", () => edit(turn), "edit"));
    return turn.answer ? [asked, card(turn)] : [asked];
  }));
  $("welcome").hidden = turns.length > 0;
  $("export").disabled = $("clear").disabled = !turns.length || running !== null;
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  if (follow) toBottom();
}

// One more piece of the answer that grows: only its text is drawn anew.
function write(turn) {
  const follow = atBottom();
  const made = log.lastElementChild;
  writeInto(made.querySelector(".said"), made, settled(turn.answer.text), []);
  if (follow) toBottom();
}

const scroller = document.querySelector("main");
function atBottom() { return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 120; }
function toBottom() { scroller.scrollTop = scroller.scrollHeight; }

function say(text, problem = false) {
  $("status").textContent = text;
  $("status").classList.toggle("problem", problem);
}

// ---------------------------------------------------------------- pictures

const MOST_SIDE = 1600; // the model sees 448 x 448; a phone's photo as it is would fill a request by the fifth question
const MOST_IMAGES = 16; // of a request, as --max-images has it by default
const LOSSLESS_PIXELS = 5e5; // beyond, a picture is sent as JPEG: as PNG it would take ten times as long

// What the browser shows is what the model gets: any format that this browser reads, turned as it is shown, the first
// frame, over white. Boxes then fit the picture on the page, and metadata such as the place of a photo stays here.
async function drawn(file) {
  const source = URL.createObjectURL(file);
  try {
    const shown = new Image();
    shown.src = source;
    await shown.decode();
    const across = shown.naturalWidth || 1024, down = shown.naturalHeight || 1024; // a drawing may have no size
    const scale = Math.min(1, MOST_SIDE / Math.max(across, down));
    const width = Math.max(1, Math.floor(across * scale)), height = Math.max(1, Math.floor(down * scale));
    const canvas = element("canvas", { width, height });
    const pen = canvas.getContext("2d", { alpha: false });
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, width, height);
    pen.imageSmoothingQuality = "high";
    pen.drawImage(shown, 0, 0, width, height);
    const url = canvas.toDataURL(width * height > LOSSLESS_PIXELS ? "image/jpeg" : "image/png", 0.95);
    return { name: file.name || t("picture"), url, width, height };
  } finally {
    URL.revokeObjectURL(source);
  }
}

async function add(files) {
  for (const file of files) {
    try {
      pending.push(await drawn(file));
      say("");
    } catch {
      say(`${file.name} ${t("noPicture")}`, true);
    }
  }
  showPending();
  question.focus();
}

function showPending() {
  $("pictures").replaceChildren(...pending.map((image) => {
    const remove = element("button", { type: "button", textContent: "×", onclick: () => { pending = pending.filter((one) => one !== image); showPending(); } });
    remove.setAttribute("aria-label", `${t("remove")}: ${image.name}`);
    return element("li", {}, element("img", { src: image.url, alt: image.name }), remove);
  }));
}

function imagesOf(transfer) {
  const files = [...(transfer?.files ?? [])]; // a browser that does not know a format gives it no type
  return files.filter((file) => file.type.startsWith("image/") || (!file.type && /\.[a-z0-9]+$/i.test(file.name)));
}

async function dropped(transfer) {
  const images = imagesOf(transfer);
  const others = [...transfer.files].filter((file) => !images.includes(file)).map((file) => file.name);
  await add(images);
  if (others.length) say(`${others.join(", ")} ${t("noPicture")}`, true);
}

// ---------------------------------------------------------------- export

function download(name, blob) {
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// The messages are as the API takes them, so the file can be sent to a server again.
function exportConversation() {
  const { system, ...sampling } = settings();
  const messages = turns.filter((turn) => complete(turn) || turn === turns.at(-1)).flatMap((turn) => [
    userMessage(turn),
    ...(complete(turn) ? [{ role: "assistant", content: turn.answer.text, boxes: turn.answer.boxes }] : []),
  ]);
  if (system) messages.unshift({ role: "system", content: system });
  const whole = { model: model?.id, exported: new Date().toISOString(), sampling, messages };
  download("conversation.json", new Blob([JSON.stringify(whole, null, 2)], { type: "application/json" }));
}

async function savePicture(image, boxes, palette) {
  const shown = new Image();
  shown.src = image.url;
  await shown.decode();
  const canvas = element("canvas", { width: image.width, height: image.height });
  const pen = canvas.getContext("2d");
  pen.drawImage(shown, 0, 0);
  const side = Math.sqrt(image.width * image.height);
  const letter = Math.max(12, side * 0.03);
  pen.lineWidth = Math.max(2, side / 220);
  pen.font = `600 ${letter}px system-ui, sans-serif`;
  pen.textBaseline = "middle";
  for (const box of boxes) {
    const colour = palette.get(box.label ?? "");
    pen.strokeStyle = pen.fillStyle = colour;
    pen.beginPath();
    corners(box).forEach(([x, y]) => pen.lineTo(x, y));
    pen.closePath();
    pen.stroke();
    if (!box.label) continue;
    const width = pen.measureText(box.label).width + letter * 0.6, height = letter * 1.4;
    const x = Math.max(0, Math.min(box.pixels[0], image.width - width));
    const y = box.pixels[1] >= height ? box.pixels[1] - height : box.pixels[1];
    pen.fillRect(x, y, width, height);
    pen.fillStyle = DARK_INK.has(colour) ? "#000" : "#fff";
    pen.fillText(box.label, x + letter * 0.3, y + height / 2);
  }
  canvas.toBlob((blob) => download(`${image.name.replace(/\.[^.]*$/, "")}-boxes.png`, blob), "image/png");
}

// ---------------------------------------------------------------- controls

function speak() { // everything that has words, in the chosen language
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = t(node.dataset.text);
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", t(node.dataset.label));
  for (const node of document.querySelectorAll("[data-title]")) node.title = t(node.dataset.title);
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = t(node.dataset.placeholder);
  $("language").textContent = language === "zh" ? "English" : "中文";
  $("language").lang = language === "zh" ? "en" : "zh";
  $("ideas").replaceChildren(...t("ideas").map((idea) => element("button", { type: "button", textContent: idea, onclick: () => { question.value = idea; question.focus(); } })));
  showPending();
  show();
}

function fit() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`;
}

const dark = matchMedia("(prefers-color-scheme: dark)");
function applyTheme() { document.documentElement.dataset.theme = stored("theme") ?? (dark.matches ? "dark" : "light"); }

$("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
question.addEventListener("input", fit);
question.addEventListener("keydown", (event) => {
  // Enter that ends the composing of a Chinese word must not send
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
addEventListener("keydown", (event) => { if (event.key === "Escape" && !panel.open) running?.abort(); });
$("stop").onclick = () => running?.abort();
$("clear").onclick = () => { turns.length = 0; say(""); show(); keep(); question.focus(); };
$("export").onclick = exportConversation;
$("language").onclick = () => { language = language === "zh" ? "en" : "zh"; store("language", language); speak(); };
$("theme").onclick = () => { store("theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark"); applyTheme(); };
dark.addEventListener("change", applyTheme);
$("settings").onclick = () => panel.showModal();
panel.addEventListener("close", () => {
  const fields = panel.querySelectorAll("[name]");
  store("settings", JSON.stringify(Object.fromEntries([...fields].map((field) => [field.name, field.value.trim()]))));
  const key = $("key").value.trim();
  if (key) sessionStorage.setItem("qvl-edge.key", key); else sessionStorage.removeItem("qvl-edge.key");
  findModel();
});
$("files").addEventListener("change", (event) => { add([...event.target.files]); event.target.value = ""; });
addEventListener("paste", (event) => { const files = imagesOf(event.clipboardData); if (files.length) { event.preventDefault(); add(files); } });
addEventListener("dragover", (event) => { event.preventDefault(); $("drop").hidden = false; });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
addEventListener("drop", (event) => { event.preventDefault(); $("drop").hidden = true; dropped(event.dataTransfer); });

const kept = JSON.parse(stored("settings") ?? "{}");
for (const field of panel.querySelectorAll("[name]")) field.value = kept[field.name] ?? "";
$("key").value = sessionStorage.getItem("qvl-edge.key") ?? "";
applyTheme();
speak();
restore();
findModel();
