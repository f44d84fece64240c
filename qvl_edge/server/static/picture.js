// A picture: {name, url, width, height}, read from a file, shown with its boxes, saved with them.

import { ink, outline, tint } from "./boxes.js";
import { download, element, svg } from "./dom.js";
import { pointable } from "./pointing.js";
import { t } from "./words.js";

const MOST_SIDE = 1600; // the model sees 448 x 448; a phone's photo as it is would fill a request by the fifth question
const LOSSLESS_PIXELS = 5e5; // beyond, a picture is sent as JPEG: as PNG it would take ten times as long

async function decoded(url) {
  const shown = new Image();
  shown.src = url;
  await shown.decode();
  return shown;
}

// What the browser shows is what the model gets: any format that this browser reads, turned as it is shown, the first
// frame, over white. Boxes then fit the picture on the page, and metadata such as the place of a photo stays here.
export async function read(file) {
  const source = URL.createObjectURL(file);
  try {
    const shown = await decoded(source);
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

const area = ({ pixels: [x1, y1, x2, y2] }) => (x2 - x1) * (y2 - y1);

// The picture under its boxes. scope: the element within which they light up with what else has their names.
export function framed(image, boxes, palette, scope) {
  const frames = svg("svg", { viewBox: `0 0 ${image.width} ${image.height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const shown = element("img", { src: image.url, alt: image.name, width: image.width, height: image.height, draggable: false });
  const stage = element("div", { className: "stage" }, shown, frames);
  for (const box of [...boxes].sort((one, other) => area(other) - area(one))) { // large ones first: none hides a small one
    const name = box.label ?? "", colour = palette.get(name);
    frames.append(pointable(tint(svg("polygon", { points: outline(box).join(" ") }), colour), scope ?? stage, name, box.number));
    if (!name) continue;
    const tag = tint(element("span", { className: "name", textContent: name, data: { name, box: box.number } }), colour);
    const [x1, y1, x2] = box.pixels;
    const right = x1 > image.width * 0.6; // from the right edge leftwards, where there is more room
    Object.assign(tag.style, right ? { right: `${100 - (x2 / image.width) * 100}%` } : { left: `${(x1 / image.width) * 100}%` });
    Object.assign(tag.style, { top: `${(y1 / image.height) * 100}%`, transform: y1 > image.height * 0.08 ? "translateY(-100%)" : "" });
    stage.append(tag);
  }
  return stage;
}

// Downloads the picture with its boxes drawn in.
export async function save(image, boxes, palette) {
  const canvas = element("canvas", { width: image.width, height: image.height });
  const pen = canvas.getContext("2d");
  pen.drawImage(await decoded(image.url), 0, 0);
  const side = Math.sqrt(image.width * image.height);
  const letter = Math.max(12, side * 0.03);
  pen.lineWidth = Math.max(2, side / 220);
  pen.font = `600 ${letter}px system-ui, sans-serif`;
  pen.textBaseline = "middle";
  for (const box of boxes) {
    const colour = palette.get(box.label ?? "");
    pen.strokeStyle = pen.fillStyle = colour;
    pen.beginPath();
    outline(box).forEach(([x, y]) => pen.lineTo(x, y));
    pen.closePath();
    pen.stroke();
    if (!box.label) continue;
    const width = pen.measureText(box.label).width + letter * 0.6, height = letter * 1.4;
    const x = Math.max(0, Math.min(box.pixels[0], image.width - width));
    const y = box.pixels[1] >= height ? box.pixels[1] - height : box.pixels[1];
    pen.fillRect(x, y, width, height);
    pen.fillStyle = ink(colour);
    pen.fillText(box.label, x + letter * 0.3, y + height / 2);
  }
  canvas.toBlob((blob) => download(`${image.name.replace(/\.[^.]*$/, "")}-boxes.png`, blob), "image/png");
}
