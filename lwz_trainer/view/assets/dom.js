"use strict";
// Small tools that every other script uses: elements, numbers, embedded data.
// Text from a run only ever becomes a text node; nothing is parsed as HTML.

const SVG_NAMESPACE = "http://www.w3.org/2000/svg";

function fillElement(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(2).filter((child) => child !== null && child !== undefined));
  return element;
}

function el(tag, attributes, ...children) {
  return fillElement(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return fillElement(document.createElementNS(SVG_NAMESPACE, tag), attributes, children);
}

function readData(id) {
  const block = document.getElementById(id);
  return block ? JSON.parse(block.textContent) : null;
}

// Four digits, or thousands; what is not a number says so.
function formatNumber(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value;
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size < 0.001) return value.toExponential(2).replace("-", "−").replace("e−", "e-");
  return minus(Number(value.toPrecision(size < 1 ? 3 : 4)));
}

function formatSigned(value, digits = 2) {
  if (typeof value !== "number") return "–";
  return (value > 0 ? "+" : "") + minus(value.toFixed(digits));
}

function minus(value) {
  return String(value).replace("-", "−");
}

function formatTick(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return minus(Number((value / 1e6).toPrecision(4))) + "M";
  if (size >= 1e4) return minus(Number((value / 1e3).toPrecision(4))) + "k";
  if (size > 0 && size < 0.001) return minus(Number(value.toPrecision(3)).toExponential());
  return minus(Number(value.toPrecision(6)));
}

function formatDuration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function isNumber(value) {
  return typeof value === "number";
}

// The entry of a sorted list that is closest to a value.
function nearest(sorted, value) {
  let best = null;
  for (const entry of sorted) {
    if (best === null || Math.abs(entry - value) < Math.abs(best - value)) best = entry;
  }
  return best;
}

// About `count` round numbers inside [low, high].
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

function scrollBehavior() {
  return matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
}
