"""The script of page.py: a click on a token, or an arrow key, shows what it looks at. It reads the data of reader.py."""

SCRIPT = """\
"use strict";
const SHOWN = 8;

function bytesOf(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

function percent(share) {
  const number = 100 * share;
  return (number >= 9.95 ? number.toFixed(0) : number >= 0.05 ? number.toFixed(1) : "<0.1") + "%";
}

/* Return [key, weight] pairs of a query, the largest first: of a head, or averaged over all heads for head -1. */
function topKeys(data, layer, head, query) {
  const heads = head < 0 ? [...Array(data.heads).keys()] : [head];
  const sums = new Map();
  for (const one of heads) {
    const start = ((layer * data.heads + one) * data.queries + query) * data.kept;
    for (let i = start; i < start + data.kept; i++) {
      const weight = (data.weights[i] / 255) ** 2 / heads.length;
      if (weight > 0) sums.set(data.keys[i], (sums.get(data.keys[i]) || 0) + weight);
    }
  }
  return [...sums].sort((a, b) => b[1] - a[1]);
}

function startReader(reader) {
  const data = JSON.parse(reader.querySelector(".data").textContent);
  const buffer = bytesOf(data.keys).buffer;
  data.keys = data.bytes === 2 ? new Uint16Array(buffer) : new Uint32Array(buffer);
  data.weights = bytesOf(data.weights);
  const box = reader.querySelector(".tokens"), found = reader.querySelector(".found");
  const tokens = [...box.querySelectorAll("span")];
  const [layer, head] = [reader.querySelector(".layer"), reader.querySelector(".head")];
  const places = new Map(tokens.map((token, place) => [token, place]));
  let chosen = -1, lit = [];

  function show() {
    for (const key of lit) tokens[key].style.removeProperty("--weight");
    if (chosen < 0) return;
    const pairs = topKeys(data, +layer.value, +head.value, chosen - data.before);
    lit = pairs.map(([key]) => key);
    for (const [key, weight] of pairs) tokens[key].style.setProperty("--weight", Math.sqrt(weight / pairs[0][1]).toFixed(3));
    const who = head.value < 0 ? "all heads, averaged" : "head " + (+head.value + 1);
    const title = document.createElement("p");
    title.append(mark(chosen), ` looks at (layer ${+layer.value + 1}, ${who}):`);
    const list = document.createElement("ol");
    for (const [key, weight] of pairs.slice(0, SHOWN)) {
      const item = document.createElement("li"), button = document.createElement("button");
      button.type = "button";
      button.append(mark(key));
      button.addEventListener("click", () => tokens[key].scrollIntoView({ block: "nearest" }));
      item.append(button, " " + percent(weight));
      list.append(item);
    }
    const rest = 1 - pairs.slice(0, SHOWN).reduce((sum, [, weight]) => sum + weight, 0);
    const note = document.createElement("p");
    if (rest > 0.01) note.append(percent(rest) + " lies elsewhere. ");
    if (head.value < 0) note.append(`The average counts the ${data.kept} largest weights of each head.`);
    found.replaceChildren(title, list, note);
  }

  /* Return a token's label and its number in the text, from 1. */
  function mark(key) {
    const place = document.createElement("span"), label = document.createElement("b");
    label.textContent = tokens[key].textContent;
    place.append(label, key < data.before ? "" : " " + (key - data.before + 1));
    return place;
  }

  function choose(key) {
    if (key < data.before || key >= tokens.length) return;
    const last = tokens[Math.max(chosen, data.before)];
    last.tabIndex = -1;
    last.setAttribute("aria-selected", "false");
    chosen = key;
    tokens[key].tabIndex = 0;
    tokens[key].setAttribute("aria-selected", "true");
    tokens[key].focus();
    show();
  }

  box.setAttribute("role", "listbox");
  box.setAttribute("aria-label", "the tokens of the text");
  for (const [token, key] of places) {
    token.setAttribute("role", "option");
    if (key < data.before) token.setAttribute("aria-disabled", "true");
    else token.tabIndex = key === data.before ? 0 : -1;
  }
  box.addEventListener("click", (event) => choose(places.get(event.target) ?? -1));
  box.addEventListener("keydown", (event) => {
    const now = places.get(event.target) ?? data.before;
    const to = { ArrowRight: now + 1, ArrowDown: now + 1, ArrowLeft: now - 1, ArrowUp: now - 1, Home: data.before,
      End: tokens.length - 1, Enter: now, " ": now }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose(to);
  });
  layer.addEventListener("change", show);
  head.addEventListener("change", show);
  for (const link of document.querySelectorAll(`a[href^="#${reader.dataset.stack}-"]`)) {
    link.addEventListener("click", () => {
      layer.value = link.dataset.layer;
      head.value = link.dataset.head;
      document.querySelector(link.hash).open = true;
      show();
    });
  }
  reader.querySelector(".controls").hidden = false;
}

document.querySelectorAll(".reader").forEach(startReader);
"""
