// One picture, large: zoom, move, and a region dragged over it that goes into the question.

import { regionText } from "./boxes.js";
import { $, element } from "./dom.js";
import { framed, save } from "./picture.js";
import { t } from "./words.js";

const MOST_ZOOM = 20, STEP = 1.4;
const SMALLEST = 4; // CSS pixels of a region's sides; less is a click

const dialog = $("viewer"), room = $("view-room");
const regionMark = element("div", { className: "region", hidden: true });
const pointers = new Map(); // those that are down, by id: the latest event of each
let view = null; // {image, boxes, palette, taken, stage, scale, zoom, x, y, marking, region}

// taken: called with the text of a region, as it stands in a question.
export function enlarge(image, { boxes = [], palette = new Map(), marking = false, taken }) {
  const stage = framed(image, boxes, palette);
  stage.append(regionMark);
  room.replaceChildren(stage);
  view = { image, boxes, palette, taken, stage, scale: 1, zoom: 1, x: 0, y: 0, region: null };
  $("view-name").textContent = image.name;
  dialog.showModal();
  setMarking(marking);
  layOut();
  room.focus();
}

const between = (low, value, high) => Math.max(low, Math.min(value, high));

function layOut() {
  const { image, stage } = view, { clientWidth, clientHeight } = room;
  view.scale = Math.min(clientWidth / image.width, clientHeight / image.height) * view.zoom;
  const width = image.width * view.scale, height = image.height * view.scale;
  const place = (at, size, space) => (size <= space ? (space - size) / 2 : between(space - size, at, 0));
  view.x = place(view.x, width, clientWidth);
  view.y = place(view.y, height, clientHeight);
  Object.assign(stage.style, { left: `${view.x}px`, top: `${view.y}px`, width: `${width}px`, height: `${height}px` });
  $("view-zoom").textContent = `${Math.round(view.scale * 100)} %`;
  regionMark.hidden = !view.region;
  if (!view.region) return;
  const [x1, y1, x2, y2] = view.region;
  const share = (part) => `${part * 100}%`;
  Object.assign(regionMark.style, { left: share(Math.min(x1, x2)), top: share(Math.min(y1, y2)), width: share(Math.abs(x2 - x1)), height: share(Math.abs(y2 - y1)) });
}

// The point of the picture under (x, y) stays where it is; without one, the middle of the view.
function zoomBy(factor, x, y) {
  const { left, top, width, height } = room.getBoundingClientRect();
  const [atX, atY] = x === undefined ? [width / 2, height / 2] : [x - left, y - top];
  const zoom = between(1, view.zoom * factor, MOST_ZOOM), by = zoom / view.zoom;
  Object.assign(view, { zoom, x: atX - (atX - view.x) * by, y: atY - (atY - view.y) * by });
  layOut();
}

function moveBy(x, y) {
  Object.assign(view, { x: view.x + x, y: view.y + y });
  layOut();
}

function setMarking(marking) {
  Object.assign(view, { marking, region: null });
  dialog.classList.toggle("marking", marking);
  $("view-mark").setAttribute("aria-pressed", String(marking));
  $("view-hint").textContent = t(marking ? "markHint" : "viewHint");
  layOut();
}

function take() {
  const { taken, region } = view;
  dialog.close();
  taken(regionText(region));
}

// A point of the page in parts of the picture's sides.
function partsOf({ clientX, clientY }) {
  const { left, top, width, height } = view.stage.getBoundingClientRect();
  return [between(0, (clientX - left) / width, 1), between(0, (clientY - top) / height, 1)];
}

function pinch(before, after) {
  const middle = ([one, other]) => [(one.clientX + other.clientX) / 2, (one.clientY + other.clientY) / 2];
  const apart = ([one, other]) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
  const [fromX, fromY] = middle(before), [toX, toY] = middle(after);
  Object.assign(view, { x: view.x + toX - fromX, y: view.y + toY - fromY });
  zoomBy(apart(after) / (apart(before) || 1), toX, toY);
}

room.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  room.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, event);
  view.region = view.marking && pointers.size === 1 ? [...partsOf(event), ...partsOf(event)] : null; // two fingers zoom
  layOut();
});

room.addEventListener("pointermove", (event) => {
  const last = pointers.get(event.pointerId);
  if (!last) return;
  const before = [...pointers.values()];
  pointers.set(event.pointerId, event);
  if (pointers.size === 2) pinch(before, [...pointers.values()]);
  else if (view.region) { view.region.splice(2, 2, ...partsOf(event)); layOut(); }
  else if (pointers.size === 1) moveBy(event.clientX - last.clientX, event.clientY - last.clientY);
});

room.addEventListener("pointerup", (event) => {
  if (!pointers.delete(event.pointerId) || !view.region) return;
  const { width, height } = regionMark.getBoundingClientRect();
  if (width >= SMALLEST && height >= SMALLEST) return take();
  view.region = null;
  layOut();
});
room.addEventListener("pointercancel", (event) => { pointers.delete(event.pointerId); view.region = null; layOut(); });

room.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoomBy(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.002)), event.clientX, event.clientY);
}, { passive: false });
room.addEventListener("dblclick", (event) => zoomBy(view.zoom > 1 ? 0 : 3, event.clientX, event.clientY));

// Arrow keys move the region, which begins in the middle; with Shift its far corner.
function moveRegion(x, y, resize) {
  view.region ??= [0.25, 0.25, 0.75, 0.75];
  const [x1, y1, x2, y2] = view.region;
  const [byX, byY] = [between(-x1, x * 0.02, 1 - x2), between(-y1, y * 0.02, 1 - y2)];
  view.region = resize
    ? [x1, y1, between(x1 + 0.01, x2 + x * 0.02, 1), between(y1 + 0.01, y2 + y * 0.02, 1)]
    : [x1 + byX, y1 + byY, x2 + byX, y2 + byY];
  layOut();
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

dialog.addEventListener("keydown", (event) => {
  const arrow = ARROWS[event.key];
  if (event.key === "+" || event.key === "=") zoomBy(STEP);
  else if (event.key === "-") zoomBy(1 / STEP);
  else if (event.key === "0") zoomBy(0);
  else if (arrow && view.marking) moveRegion(...arrow, event.shiftKey);
  else if (arrow) moveBy(arrow[0] * -60, arrow[1] * -60);
  else if (event.key === "Enter" && view.region && event.target === room) take();
  else return;
  event.preventDefault();
});

$("view-in").onclick = () => zoomBy(STEP);
$("view-out").onclick = () => zoomBy(1 / STEP);
$("view-fit").onclick = () => zoomBy(0);
$("view-mark").onclick = () => { setMarking(!view.marking); room.focus(); };
$("view-save").onclick = () => save(view.image, view.boxes, view.palette);
$("view-close").onclick = () => dialog.close();
dialog.addEventListener("close", () => { pointers.clear(); room.replaceChildren(); });
addEventListener("resize", () => dialog.open && layOut());
