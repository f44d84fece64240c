// The page's words in both languages.

import { store, stored } from "./store.js";

const WORDS = {
  en: {
    skip: "To the question", theme: "Light or dark", export: "Export", settings: "Settings", chats: "Conversations", fresh: "New conversation",
    welcome: "Ask about your pictures", welcomeMore: "Drop, paste or choose pictures, then ask. What the answer names is framed in the picture. Pictures go to this server only.",
    ideas: ["Describe the picture with boxes.", "What number is printed?", "Find the red circle."],
    log: "Conversation", pictures: "Pictures of the next question", attach: "Add pictures", question: "Your question", send: "Send", stop: "Stop",
    drop: "Drop the pictures here", settingsMore: "Empty fields are the model's own settings.", system: "System prompt", temperature: "Temperature (0: greedy)",
    penalty: "Repetition penalty", tokens: "Longest answer (tokens)", seed: "Seed", key: "API key (kept until this tab closes)", keyNeeded: "This server needs an API key.", done: "Done",
    you: "You", answer: "Answer", copy: "Copy", copied: "Copied", again: "Regenerate", save: "Save picture", remove: "Remove", picture: "Picture", box: "box", boxes: "Boxes", boxCount: "Boxes:",
    stopped: "stopped", cut: "cut at the token limit", noPicture: "is not a picture that can be shown in this browser; save it as JPEG or PNG.",
    tokensWord: "tokens", perSecond: "tokens/s", first: "first after", memory: "Memory", thinking: "Answering …", ready: "Answer complete", edit: "Edit",
    move: "Boxes to the next picture", copyJson: "Copy JSON", copyCoco: "Copy COCO", broken: "broken off: later questions do not see it",
    dropped: "The oldest turns were left out: one request has at most 16 pictures.", offline: "The server cannot be reached.", ended: "The answer ended early.",
    deleted: "Conversation deleted.", notKept: "This browser has no room to keep the conversation; export it.", undo: "Undo", enlarge: "Enlarge", zoomIn: "Zoom in", zoomOut: "Zoom out", fit: "Fit", mark: "Mark a region", close: "Close",
    viewHint: "Wheel, pinch or + and − zoom; drag or arrow keys move the picture.",
    markHint: "Drag over what your question is about. By keyboard: arrow keys move the region, with Shift they resize it, Enter takes it.",
  },
  zh: {
    skip: "跳到问题", theme: "浅色或深色", export: "导出", settings: "设置", chats: "对话列表", fresh: "新对话",
    welcome: "就图片提问", welcomeMore: "拖入、粘贴或选择图片，然后提问。回答中提到的物体会在图上框出。图片只发送到本服务器。",
    ideas: ["描述这张图并框出图形。", "印着什么数字？", "框出红色圆形。"],
    log: "对话", pictures: "下一个问题的图片", attach: "添加图片", question: "您的问题", send: "发送", stop: "停止",
    drop: "把图片拖到这里", settingsMore: "留空则使用模型自己的设置。", system: "系统提示词", temperature: "温度（0 为贪心）",
    penalty: "重复惩罚", tokens: "回答最大长度（token）", seed: "随机种子", key: "API 密钥（关闭标签页即清除）", keyNeeded: "本服务器需要 API 密钥。", done: "完成",
    you: "您", answer: "回答", copy: "复制", copied: "已复制", again: "重新生成", save: "保存图片", remove: "移除", picture: "图片", box: "框", boxes: "检测框", boxCount: "检测框：",
    stopped: "已停止", cut: "达到长度上限", noPicture: "不是本浏览器能显示的图片，请另存为 JPEG 或 PNG。",
    tokensWord: "token", perSecond: "token/秒", first: "首字", memory: "内存", thinking: "正在回答……", ready: "回答完成", edit: "编辑",
    move: "框移到下一张图", copyJson: "复制 JSON", copyCoco: "复制 COCO", broken: "未完成：后续提问不包含它",
    dropped: "已略去最早的几轮：每次请求最多 16 张图片。", offline: "无法连接服务器。", ended: "回答提前中断。",
    deleted: "对话已删除。", notKept: "浏览器没有空间保存对话，请导出。", undo: "撤销", enlarge: "放大查看", zoomIn: "放大", zoomOut: "缩小", fit: "适应窗口", mark: "标出区域", close: "关闭",
    viewHint: "滚轮、双指或 + − 缩放；拖动或方向键移动图片。",
    markHint: "拖动框出您要问的区域。键盘：方向键移动区域，按住 Shift 调整大小，Enter 确定。",
    problems: {
      invalid_api_key: "API 密钥不正确", queue_full: "服务器正忙，请稍后重试", rate_limit_exceeded: "请求过于频繁，请稍后重试", request_too_large: "请求过大，请减少图片",
      too_many_images: "图片太多", too_many_pixels: "图片太大", bad_image: "图片无法读取", context_length_exceeded: "对话超出模型的上下文长度，请新建对话",
      out_of_memory: "内存不足", time_limit: "回答超时", stopping: "服务器正在关闭", engine_failed: "推理失败，请查看服务器日志", host_not_allowed: "不允许以此主机名访问",
    },
  },
};

let language = stored("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");

export const t = (name) => WORDS[language][name];
export const isChinese = () => language === "zh";

export function switchLanguage() {
  language = isChinese() ? "en" : "zh";
  store("language", language);
}

// What the server said is wrong, with its meaning in front where the reader's language is not the server's.
export function problem(code, message) {
  const meaning = WORDS[language].problems?.[code];
  return meaning ? `${meaning}（${message}）` : message;
}

const PLACES = {
  text: (node, word) => { node.textContent = word; },
  label: (node, word) => node.setAttribute("aria-label", word),
  title: (node, word) => { node.title = word; },
  placeholder: (node, word) => { node.placeholder = word; },
};

// Puts the words into every node that names one: data-text, data-label, data-title, data-placeholder.
export function speak() {
  document.documentElement.lang = isChinese() ? "zh-CN" : "en";
  for (const [place, put] of Object.entries(PLACES)) {
    for (const node of document.querySelectorAll(`[data-${place}]`)) put(node, t(node.dataset[place]));
  }
}
