"use strict";
// The server draws the page; this only fetches it again when something happened, and puts in what changed.
// Parts that change have an id and data-live.

const page = document.querySelector("main");
const connection = document.getElementById("connection");
const EVENTS = ["queued", "running", "phase", "progress", "block", "metric", "log", "retrying", "recovered", "cancelling",
  "succeeded", "failed", "cancelled"];
const PAUSE_MS = 500;
let timer = null, busy = false, again = false;

function say(text) {
  if (connection && connection.textContent !== text) connection.textContent = text;
}

async function refresh() {
  timer = null;
  if (busy) { again = true; return; }
  busy = true;
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (answer.redirected || answer.status === 404) { location.reload(); return; } // signed out, or deleted
    if (answer.ok) swap(new DOMParser().parseFromString(await answer.text(), "text/html"));
  } catch { // the network is away: the next event or tick tries again
  } finally {
    busy = false;
    if (again) { again = false; later(); }
  }
}

// What the server sent of each part: tips, opened details and ticked boxes change the page, and are no reason to draw it anew.
const drawn = new Map([...document.querySelectorAll("[data-live]")].map((part) => [part.id, part.outerHTML]));

function swap(fresh) {
  for (const part of document.querySelectorAll("[data-live]")) {
    const now = fresh.getElementById(part.id);
    if (!now || drawn.get(part.id) === now.outerHTML) continue;
    drawn.set(part.id, now.outerHTML);
    const boxes = [...part.querySelectorAll("[id]")];
    const focused = part.contains(document.activeElement) ? document.activeElement.id : "";
    const scrolled = boxes.filter((box) => box.scrollTop).map((box) => [box.id, box.scrollTop]);
    const open = boxes.filter((box) => box.open).map((box) => box.id), ticked = boxes.filter((box) => box.checked).map((box) => box.id);
    part.replaceWith(now);
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    for (const id of ticked) { const box = document.getElementById(id); if (box) box.checked = true; }
    for (const [id, top] of scrolled) document.getElementById(id)?.scrollTo(0, top);
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  }
}

function later() {
  timer ??= setTimeout(refresh, PAUSE_MS);
}

function follow(url) {
  const source = new EventSource(url);
  let ended = false;
  source.onopen = () => say("Live");
  source.onerror = () => {
    if (ended) return;
    const closed = source.readyState === EventSource.CLOSED; // refused: signed out, deleted, or too many streams
    say(closed ? "Not live: reload the page." : "Connection lost, trying again …");
    if (closed) later();
  };
  for (const name of EVENTS) source.addEventListener("job." + name, later);
  for (const name of ["succeeded", "failed", "cancelled"]) {
    source.addEventListener("job." + name, () => { ended = true; source.close(); say(""); });
  }
}

if (page.dataset.events) follow(page.dataset.events);
if (page.dataset.every) {
  setInterval(() => { if (!document.hidden) refresh(); }, 1000 * Number(page.dataset.every));
}

// The form: a slider beside the number, and the plan without leaving the page.
const form = document.getElementById("new");

function slide(number) {
  const slider = document.createElement("input");
  Object.assign(slider, { type: "range", min: 0, max: 0.95, step: 0.01, value: number.value || 0.5 });
  slider.setAttribute("aria-label", "Sparsity, as a slider");
  slider.oninput = () => { number.value = slider.value; };
  number.addEventListener("input", () => { slider.value = number.value || 0.5; });
  number.after(slider);
}

async function plan(button) {
  const out = document.getElementById("plan");
  button.disabled = true;
  out.textContent = "Planning …";
  try {
    const body = new URLSearchParams(new FormData(form));
    const answer = await fetch(button.formAction, { method: "POST", body, headers: { Accept: "text/html" } });
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const id of ["plan", "problem"]) {
      const now = fresh.getElementById(id);
      document.getElementById(id).replaceChildren(...(now ? now.childNodes : [fresh.querySelector("main")?.innerText ?? ""]));
    }
  } catch {
    out.textContent = "The service did not answer; try again.";
  } finally {
    button.disabled = false;
  }
}

if (form) {
  // Titles are there for the pointer and for screen readers; who tabs or taps sees them here.
  form.addEventListener("focusin", (event) => { document.getElementById("hint").textContent = event.target.title ?? ""; });
  for (const number of form.querySelectorAll("[data-slider]")) slide(number);
  form.addEventListener("submit", (event) => {
    if (event.submitter?.id !== "do-plan") return;
    event.preventDefault();
    plan(event.submitter);
  });
}
