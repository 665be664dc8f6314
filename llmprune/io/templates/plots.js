"use strict";
// What a plot has beyond being looked at: a tip for the mark under the pointer or the focus, arrow keys from mark to mark,
// and PNG. Delegated from the document, so that plots may be replaced.
(() => {
const SCALE = 2;
const tip = document.createElement("div");
tip.className = "tip";
tip.setAttribute("role", "status");
tip.hidden = true;
document.body.append(tip);
document.documentElement.classList.add("js");
let hot = null;

function hide() {
  hot?.classList.remove("hot");
  hot = null;
  tip.hidden = true;
}

function show(mark) {
  if (mark === hot) return;
  hide();
  const title = mark.querySelector("title");
  if (title) { mark.dataset.tip = title.textContent; title.remove(); } // else the browser shows its own as well
  hot = mark;
  mark.classList.add("hot");
  tip.textContent = mark.dataset.tip;
  tip.hidden = false;
  const box = mark.getBoundingClientRect(), own = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(box.left + box.width / 2 - own.width / 2, innerWidth - own.width - 4)) + "px";
  tip.style.top = (box.top > own.height + 12 ? box.top - own.height - 8 : box.bottom + 8) + "px";
}

function markOf(target) {
  const mark = target.closest?.("figure svg [data-tip], figure svg :has(> title), figure svg a");
  return mark?.matches("a") ? mark.querySelector("[data-tip], :has(> title)") : mark;
}

function centre(mark) {
  const box = mark.getBoundingClientRect();
  return [box.left + box.width / 2, box.top + box.height / 2];
}

// The nearest mark that way; one that lies askew counts as farther.
function next(marks, [across, down]) {
  const [x, y] = centre(hot);
  const far = (mark) => {
    const [left, top] = centre(mark), along = (left - x) * across + (top - y) * down;
    return along > 0.5 ? along + 3 * Math.abs((left - x) * down + (top - y) * across) : Infinity;
  };
  return marks.map((mark) => [far(mark), mark]).reduce((best, one) => one[0] < best[0] ? one : best, [Infinity, hot])[1];
}

const WAYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

document.addEventListener("pointerover", (event) => { const mark = markOf(event.target); if (mark) show(mark); else hide(); });
document.addEventListener("focusin", (event) => { const mark = markOf(event.target); if (mark) show(mark); else hide(); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide();
  const way = WAYS[event.key], box = event.target.closest?.("figure .scroll");
  if (!way || !box || event.target !== box) return;
  const marks = [...box.querySelectorAll("svg [data-tip], svg :has(> title)")];
  if (!marks.length) return;
  event.preventDefault();
  const mark = marks.includes(hot) ? next(marks, way) : marks[0];
  mark.scrollIntoView({ block: "nearest", inline: "nearest" });
  show(mark);
});

function ground(box) {
  for (; box; box = box.parentElement) {
    const colour = getComputedStyle(box).backgroundColor;
    if (!/^transparent$|, 0\)$/.test(colour)) return colour;
  }
  return "white";
}

async function png(figure) {
  const svg = figure.querySelector("svg"), copy = svg.cloneNode(true), { width, height } = svg.viewBox.baseVal;
  copy.setAttribute("color", getComputedStyle(svg).color); // of currentColor
  copy.setAttribute("width", SCALE * width);
  copy.setAttribute("height", SCALE * height);
  const image = new Image();
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(new XMLSerializer().serializeToString(copy));
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = SCALE * width;
  canvas.height = SCALE * height;
  const brush = canvas.getContext("2d");
  brush.fillStyle = ground(svg);
  brush.fillRect(0, 0, canvas.width, canvas.height);
  brush.drawImage(image, 0, 0);
  const link = document.createElement("a");
  link.download = figure.dataset.name + ".png";
  link.href = canvas.toDataURL("image/png");
  link.click();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("button.png");
  if (button) png(button.closest("figure"));
});
})();
