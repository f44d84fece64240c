// Requests to this server.

import { problem, t } from "./words.js";

const KEY = "qvl-edge.key"; // until the tab closes

export const key = () => sessionStorage.getItem(KEY) ?? "";
export function setKey(value) { if (value) sessionStorage.setItem(KEY, value); else sessionStorage.removeItem(KEY); }

export class KeyNeeded extends Error {}

async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json", ...(key() ? { Authorization: `Bearer ${key()}` } : {}) };
  let response;
  try {
    response = await fetch(path, { headers, ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(t("offline"));
  }
  if (response.ok) return response;
  const { code, message } = (await response.json().catch(() => null))?.error ?? {};
  throw new (response.status === 401 ? KeyNeeded : Error)(problem(code, message ?? `HTTP ${response.status}`));
}

export async function findModel() { return (await (await request("/v1/models")).json()).data[0]; }

// What the model takes, in words, as /metrics counts it; "" where this key may not read them.
export async function memory() {
  const text = await request("/metrics").then((response) => response.text()).catch(() => "");
  const gigabytes = (name) => (Number(text.match(new RegExp(`^${name} (\\d+)$`, "m"))?.[1] ?? 0) / 1e9).toFixed(1);
  if (!text) return "";
  const card = gigabytes("qvl_edge_gpu_memory_bytes");
  if (card > 0) return `GPU ${gigabytes("qvl_edge_gpu_memory_used_bytes")} / ${card} GB`;
  return `${t("memory")} ${gigabytes("process_resident_memory_bytes")} GB`;
}

// The chunks of an answer; an error where the stream carries one or ends before its [DONE].
export async function* chunks(body, signal) {
  const response = await request("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => { throw error.name === "AbortError" ? error : new Error(t("ended")); });
    if (done) throw new Error(t("ended"));
    held += value;
    let end;
    while ((end = held.indexOf("\n\n")) >= 0) {
      const line = held.slice(0, end);
      held = held.slice(end + 2);
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(problem(chunk.error.code, chunk.error.message));
      yield chunk;
    }
  }
}
