// Boxes in text, their colours, and the formats that they leave the page in.

// as qvl_edge/text/draw.py, so that the page and `--draw` colour alike
const PALETTE = ["#e6194b", "#0082ff", "#3cb44b", "#ffd700", "#911eb4", "#f58230", "#00c8c8", "#f032e6", "#800000", "#0000a0", "#beff3c", "#785514"];
const DARK_INK = new Set(["#ffd700", "#f58230", "#00c8c8", "#beff3c", "#3cb44b"]);

const MARKUP = /<ref>((?:(?!<\/?(?:ref|box|quad)>)[^])*)<\/ref>|<(box|quad)>[^<]*<\/\2>/g;
const REGION = /(?:(?:Picture |图片 ?)(\d+) ?)?<box>\((\d{1,4}),(\d{1,4})\),\((\d{1,4}),(\d{1,4})\)<\/box>/g;
const GRID = 1000; // the model counts a picture's sides in thousandths

export const ink = (colour) => (DARK_INK.has(colour) ? "#000" : "#fff");

// Text between marks, phrases, and boxes that have no phrase before them.
export function parts(text) {
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
export function settled(text) {
  return text.replace(/<(box|quad)>[^<]*(<[^>]*)?$/, "").replace(/<ref>((?:(?!<\/ref>)[^])*)$/, "$1").replace(/<\/?[a-z]*$/, "");
}

// A colour for each name, in the order in which they come.
export function colours(text, boxes) {
  const names = [...boxes.map((box) => box.label ?? ""), ...parts(text).filter((part) => "phrase" in part).map((part) => part.phrase)];
  return new Map([...new Set(names)].map((name, index) => [name, PALETTE[index % PALETTE.length]]));
}

export function tint(node, colour) {
  node.style.setProperty("--colour", colour);
  node.style.setProperty("--ink", ink(colour));
  return node;
}

export function outline(box) {
  const [x1, y1, x2, y2] = box.pixels;
  return box.quad_pixels ?? [[x1, y1], [x2, y1], [x2, y2], [x1, y2]];
}

const toPixels = ({ width, height }) => (x, y) => [Math.floor((x / GRID) * width), Math.floor((y / GRID) * height)];

// The same place in another picture.
export function moved(box, index, image) {
  const scaled = toPixels(image), [x1, y1, x2, y2] = box.corners;
  const made = { ...box, image: index, pixels: [...scaled(x1, y1), ...scaled(x2, y2)] };
  if (box.quad) made.quad_pixels = box.quad.map(([x, y]) => scaled(x, y));
  return made;
}

// A region, in parts of the picture's sides, as the model reads it. Its coordinates end at 999.
export function regionText([x1, y1, x2, y2]) {
  const point = (x, y) => `(${[x, y].map((part) => Math.min(GRID - 1, Math.max(0, Math.round(part * GRID)))).join(",")})`;
  return `<box>${point(Math.min(x1, x2), Math.min(y1, y2))},${point(Math.max(x1, x2), Math.max(y1, y2))}</box>`;
}

// The regions of a question, on the picture that it names, or else on its last.
export function regions(text, images) {
  return [...text.matchAll(REGION)].flatMap(([, number, ...corners]) => {
    const index = number && images[number - 1] ? number - 1 : images.length - 1;
    return images[index] ? [moved({ label: null, corners: corners.map(Number) }, index, images[index])] : [];
  });
}

// As `qvl-edge label --format coco` writes them.
export function coco(images, boxes) {
  const used = [...new Set(boxes.map((box) => box.image))].sort((one, other) => one - other);
  const names = [...new Set(boxes.map((box) => box.label || "object"))].sort();
  const annotations = used.flatMap((index) => boxes.filter((box) => box.image === index).map((box) => {
    const { width, height } = images[index], [x1, y1, x2, y2] = box.pixels;
    const [left, top, right, bottom] = [Math.max(x1, 0), Math.max(y1, 0), Math.min(x2, width), Math.min(y2, height)];
    return {
      image_id: used.indexOf(index) + 1, category_id: names.indexOf(box.label || "object") + 1,
      bbox: [left, top, right - left, bottom - top], area: (right - left) * (bottom - top),
      segmentation: [(box.quad_pixels ?? outline({ pixels: [left, top, right, bottom] })).flat()], iscrowd: 0,
    };
  }));
  return {
    info: { description: "made with qvl_edge" },
    images: used.map((index, at) => ({ id: at + 1, file_name: images[index].name, width: images[index].width, height: images[index].height })),
    annotations: annotations.map((one, at) => ({ id: at + 1, ...one })),
    categories: names.map((name, at) => ({ id: at + 1, name })),
  };
}
