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

function swap(fresh) {
  for (const part of document.querySelectorAll("[data-live]")) {
    const now = fresh.getElementById(part.id);
    if (!now || part.outerHTML === now.outerHTML) continue;
    const focused = part.contains(document.activeElement) ? document.activeElement.id : "";
    const scrolled = [...part.querySelectorAll("[id]")].filter((box) => box.scrollTop).map((box) => [box.id, box.scrollTop]);
    part.replaceWith(now);
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
