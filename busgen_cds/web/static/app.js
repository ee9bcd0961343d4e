// What all pages share: theme, keys, news of changes, and telling what went wrong.
"use strict";

const said = document.getElementById("said");
let quiet = 0;

function tell(text, bad = false) {
  said.textContent = text;
  said.classList.toggle("bad", bad);
  said.classList.add("shown");
  clearTimeout(quiet);
  quiet = setTimeout(() => said.classList.remove("shown"), bad ? 12000 : 5000);
}

function switchTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
  const next = now === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  localStorage.setItem("theme", next);
}

const help = document.getElementById("keys");
const acts = {
  theme: switchTheme,
  keys: () => (help.open ? help.close() : help.showModal()),
};

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-act]");
  if (button && acts[button.dataset.act]) acts[button.dataset.act](button);
  const row = event.target.closest("tr[data-row]");
  if (row && !event.target.closest("a, button") && !getSelection().toString()) row.querySelector("a.open").click();
});

document.addEventListener("change", (event) => {
  if (event.target.matches("[data-submit]")) event.target.form.requestSubmit();
});

// -- htmx: a refusal is said aloud, and nothing is swapped for it

document.body.addEventListener("htmx:responseError", (event) => {
  const text = event.detail.xhr.responseText;
  tell(text && text.length < 600 && !text.startsWith("<") ? text : "That did not work. Try again.", true);
});
document.body.addEventListener("htmx:sendError", () => tell("The server does not answer. What you see may be old.", true));
document.body.addEventListener("htmx:afterSwap", (event) => {
  if (event.detail.target.id === "said") tell(said.textContent);
});

// -- news, to pages in sight alone: a browser opens six connections to a server, for all its tabs together

const live = document.getElementById("live");
const AGAIN = 30000; // milliseconds, after a refusal: browsers try again by themselves only when nobody answers
let news = null;
let heard = false;

function renew() {
  htmx.trigger(document.body, "changed");
}

function listen() {
  if (news || document.hidden) return;
  news = new EventSource("/events");
  news.addEventListener("hello", () => {
    live?.classList.add("on");
    if (heard) renew(); // what changed while nobody listened
    heard = true;
  });
  news.addEventListener("changed", renew);
  news.addEventListener("error", () => {
    live?.classList.remove("on");
    if (news?.readyState !== EventSource.CLOSED) return;
    news = null;
    setTimeout(listen, AGAIN);
  });
}

function hangUp() {
  news?.close();
  news = null;
  live?.classList.remove("on");
}

if (document.querySelector("[data-live]")) {
  listen();
  document.addEventListener("visibilitychange", () => (document.hidden ? hangUp() : listen()));
  addEventListener("pagehide", hangUp);
  addEventListener("pageshow", listen);
}

// -- the worklist by keys

function typing(event) {
  return event.target.closest("input:not([type=range]), select, textarea") || event.ctrlKey || event.metaKey || event.altKey;
}

function rowAt(step) {
  const links = [...document.querySelectorAll("tr[data-row] a.open")];
  const here = links.indexOf(document.activeElement);
  const next = links[Math.min(links.length - 1, Math.max(0, here + step))];
  if (next) next.focus();
}

const listKeys = {
  j: () => rowAt(1),
  k: () => rowAt(-1),
  ArrowDown: () => rowAt(1),
  ArrowUp: () => rowAt(-1),
  "/": () => document.getElementById("search").focus(),
  t: () => {
    const row = document.activeElement.closest("tr, li");
    const button = (row && row.querySelector("button.retry")) || document.querySelector("button.retry");
    if (button) button.click();
  },
};

document.addEventListener("keydown", (event) => {
  if (typing(event) || help.open) return;
  if (event.key === "?") {
    event.preventDefault();
    acts.keys();
  } else if (document.getElementById("worklist")) {
    const tab = document.querySelectorAll("#tabs a")[Number(event.key) - 1];
    const act = listKeys[event.key] || (tab && (() => tab.click()));
    if (!act) return;
    event.preventDefault();
    act();
  }
});

// A list that renews itself keeps the row one was on.
let held = null;
document.body.addEventListener("htmx:beforeSwap", (event) => {
  const link = document.activeElement;
  held = event.detail.target.contains(link) && link.matches("a.open") ? link.getAttribute("href") : null;
});
document.body.addEventListener("htmx:afterSettle", () => {
  if (held) document.querySelector(`tr[data-row] a.open[href="${held}"]`)?.focus();
  held = null;
});
