// Keeps the page up to date without a flicker: fetches it again and replaces those sections that differ; shows the numbers
// under the pointer. The server draws everything.
"use strict";

const PERIOD_MS = 3000;
let answered = Date.now();

const address = new URL(location);
if (address.searchParams.has("token")) {  // the cookie knows it now; it need not stand in the history
  address.searchParams.delete("token");
  history.replaceState(null, "", address);
}

async function refresh() {
  if (document.hidden) return;
  try {
    const reply = await fetch(address, { cache: "no-store", redirect: "error" });
    if (reply.status === 401) return lost("The monitor was started anew and asks for its token.");
    if (!reply.ok) return lost((await reply.text()).match(/<h1>(.*)<\/h1>/)?.[1] ?? `The monitor answers ${reply.status}.`);
    const fresh = new DOMParser().parseFromString(await reply.text(), "text/html");
    if (document.title !== fresh.title) document.title = fresh.title;
    for (const section of fresh.querySelectorAll("[data-live]")) {
      const old = document.getElementById(section.id);
      if (old && old.outerHTML !== section.outerHTML && !old.contains(pointed)) old.replaceWith(document.adoptNode(section));
    }
    answered = Date.now();
    lost("");
  } catch {
    lost(`No answer from the monitor; this is of ${new Date(answered).toLocaleTimeString()}.`);
  }
}

function lost(text) {
  const note = document.getElementById("lost");
  note.textContent = text;
  note.hidden = !text;
}

setInterval(refresh, PERIOD_MS);
document.addEventListener("visibilitychange", refresh);

// ---- numbers under the pointer

let pointed = null;
const SVG = "http://www.w3.org/2000/svg";

function told(value, scale) {
  if (scale === "share") return `${(100 * value).toPrecision(3)} %`;
  if (scale === "hours") return value < 60 ? `${value.toFixed(0)} s` : value < 3600 ? `${(value / 60).toFixed(1)} min` : `${(value / 3600).toFixed(2)} h`;
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : value.toPrecision(4);
}

function nearest(path, x) {
  let best = null;
  for (const [, px, py] of path.getAttribute("d").matchAll(/(-?[\d.]+) (-?[\d.]+)/g)) {
    if (!best || Math.abs(px - x) < Math.abs(best[0] - x)) best = [Number(px), Number(py)];
  }
  return best;
}

function point(event) {
  const chart = event.target.closest?.("svg.chart") ?? null;
  if (pointed && pointed !== chart) pointed.querySelector(".hover")?.remove();
  pointed = chart;
  if (!chart) return;
  const [left, right, top, bottom] = chart.dataset.frame.split(" ").map(Number);
  const [lowX, highX, scaleX] = chart.dataset.x.split(" "), [lowY, highY, scaleY] = chart.dataset.y.split(" ");
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
  const places = [...chart.querySelectorAll("path.line")].map((path) => [path, nearest(path, at.x)]).filter(([, place]) => place);
  chart.querySelector(".hover")?.remove();
  if (!places.length || at.x < left - 8) return;
  const hover = document.createElementNS(SVG, "g");
  hover.setAttribute("class", "hover");
  const add = (kind, attributes, text = "") => {
    const element = document.createElementNS(SVG, kind);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = text;
    hover.append(element);
  };
  const px = places[0][1][0];
  const value = (place, low, high, from, to) => Number(low) + (place - from) / (to - from) * (high - low);
  add("path", { d: `M${px} ${top}V${bottom}` });
  for (const [path, [x, y]] of places) add("circle", { cx: x, cy: y, r: 2.6, class: path.getAttribute("class") });
  const said = places.map(([path, place]) => `${places.length > 1 ? path.dataset.name + " " : ""}${told(value(place[1], lowY, highY, bottom, top), scaleY)}`);
  const where = `at ${told(value(px, lowX, highX, left, right), scaleX)}: `;
  const anchor = px > (left + right) / 2 ? "end" : "start";
  const x = px + (anchor === "end" ? -6 : 6);
  const lines = said.length > 1 ? [where, ...said] : [where + said[0]];
  add("rect", { x: anchor === "end" ? x - 118 : x - 4, y: top - 2, width: 122, height: 12 * lines.length + 6, rx: 4 });
  lines.forEach((line, i) => add("text", { x, y: top + 10 + 12 * i, "text-anchor": anchor }, line));
  chart.append(hover);
}

document.addEventListener("pointermove", point);
document.addEventListener("pointerleave", point);
