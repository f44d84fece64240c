// Boxes, their names and the phrases of an answer light one another up.

// A phrase lights all boxes of its name; a box only itself, and the phrase that names it.
function point(scope, to) {
  scope.classList.toggle("pointing", to !== null);
  for (const node of scope.querySelectorAll("[data-name]")) {
    const here = to !== null && node.dataset.name === to.name;
    node.classList.toggle("lit", here && (!to.box || !node.dataset.box || node.dataset.box === to.box));
  }
}

// name: the label; box: which of the answer's boxes it is, nothing for a phrase.
export function pointable(node, scope, name, box) {
  node.dataset.name = name;
  if (box !== undefined) node.dataset.box = box;
  for (const event of ["pointerenter", "focus"]) node.addEventListener(event, () => point(scope, node.dataset));
  for (const event of ["pointerleave", "blur"]) node.addEventListener(event, () => point(scope, null));
  return node;
}
