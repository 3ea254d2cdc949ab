// One line chart (or stacked bars) as SVG. A chart reads the page's `state` and draws; moving over
// any chart sets `state.hover`, and all charts then show their values at that step.

const CHART_HEIGHT = 190;
const MARGIN = { left: 46, right: 12, top: 12, bottom: 24 };
const DASHES = ["", "6 4", "2 4", "8 3 2 3"];

class Chart {
  constructor(spec, page) {
    this.spec = spec;
    this.page = page;
    this.legend = el("div", { class: "legend" });
    this.surface = svg("svg", {
      class: "plot", height: CHART_HEIGHT, tabindex: 0, role: "img",
      "aria-label": `${spec.title}. Arrow keys move between steps, Enter opens the samples.`,
    });
    this.element = el("figure", { class: "chart" },
      el("figcaption", {}, el("h3", {}, spec.title), el("span", { class: "unit" }, page.runs.length > 1 ? spec.unit.replace(" ± std", "") : spec.unit)),
      this.legend, this.surface);
    this.surface.addEventListener("pointermove", (event) => page.hover(this.stepAt(event)));
    this.surface.addEventListener("pointerleave", () => page.hover(null));
    this.surface.addEventListener("click", (event) => page.openStep(this.stepAt(event)));
    this.surface.addEventListener("keydown", (event) => this.onKey(event));
    this.surface.addEventListener("blur", () => page.hover(null));
    new ResizeObserver(([entry]) => {
      const width = Math.round(entry.contentRect.width);
      if (width && width !== this.width) { this.width = width; this.draw(); }
    }).observe(this.surface);
  }

  // ---- data -----------------------------------------------------------------------------------

  // The curves to draw: one for each visible run and series that has data.
  curves() {
    const { runs, state } = this.page;
    const many = runs.length > 1;
    const curves = [];
    this.spec.series.forEach(([key, label], s) => runs.forEach((run, r) => {
      const isShown = this.spec.stacked ? r === state.run : !state.hidden.has(r);
      const values = run.series[key];
      if (!isShown || !values) return;
      const color = `var(--c${(many && !this.spec.stacked ? r : s) % 8})`;
      const dash = many && !this.spec.stacked ? DASHES[s % DASHES.length] : "";
      curves.push({ run, r, s, label, color, dash, values, smooth: smoothed(values, state.smoothing) });
    }));
    return curves;
  }

  // ---- drawing --------------------------------------------------------------------------------

  draw() {
    if (!this.width) return;
    this.drawn = this.curves();
    this.stacks = this.spec.stacked ? stack(this.drawn, this.spec.total, this.page) : null;
    this.setScales();
    this.overlay = svg("g", {});
    this.surface.replaceChildren(this.axes(), this.body(), this.marks(), this.overlay);
    this.drawLegend();
    this.drawHover();
  }

  setScales() {
    const { first, last } = this.page.range;
    const inner = this.width - MARGIN.left - MARGIN.right;
    const span = last - first || 1;
    const from = last === first ? first - 0.5 : first;
    const room = this.spec.stacked ? inner / (2 * (span + 1)) : 0;
    this.x = (step) => MARGIN.left + room + ((step - from) / span) * (inner - 2 * room);
    this.stepFromX = (x) => from + ((x - MARGIN.left - room) / (inner - 2 * room)) * span;
    let [low, high] = this.extent();
    if (this.spec.zero || this.stacks) { low = Math.min(low, 0); high = Math.max(high, 0); }
    if (high - low < 1e-12) { const pad = Math.abs(high) * 0.1 || 1; high += pad; low -= this.spec.zero ? 0 : pad; }
    const pad = (high - low) * 0.06;
    this.low = this.spec.zero && low === 0 ? 0 : low - (this.stacks ? 0 : pad);
    this.high = high + pad;
    const plot = CHART_HEIGHT - MARGIN.top - MARGIN.bottom;
    this.y = (value) => MARGIN.top + plot * (1 - (value - this.low) / (this.high - this.low));
  }

  extent() {
    let low = Infinity, high = -Infinity;
    const include = (value) => { low = Math.min(low, value); high = Math.max(high, value); };
    if (this.stacks) { include(0); for (const part of this.stacks) for (const [, top] of part.spans.values()) include(top); }
    else for (const curve of this.drawn) {
      curve.values.forEach((value, i) => {
        if (!isNumber(value)) return;
        const std = this.bandOf(curve)?.[i];
        include(isNumber(std) ? value - std : value);
        include(isNumber(std) ? value + std : value);
      });
    }
    return low <= high ? [low, high] : [0, 1];
  }

  // One run's ± std is drawn as a band; bands of several runs would hide each other.
  bandOf(curve) {
    return this.spec.band && this.page.runs.length === 1 ? curve.run.series[this.spec.band] : null;
  }

  axes() {
    const group = svg("g", { class: "axes" });
    const right = this.width - MARGIN.right, bottom = CHART_HEIGHT - MARGIN.bottom;
    for (const value of ticks(this.low, this.high, 4)) {
      const y = this.y(value);
      group.append(
        svg("line", { x1: MARGIN.left, x2: right, y1: y, y2: y }),
        svg("text", { x: MARGIN.left - 7, y: y + 4, "text-anchor": "end" }, formatTick(value)));
    }
    const { first, last } = this.page.range;
    for (const step of ticks(first, Math.max(last, first + 1), Math.max(2, this.width / 90))) {
      if (!Number.isInteger(step) || step > last) continue;
      group.append(svg("text", { x: this.x(step), y: bottom + 16, "text-anchor": "middle" }, formatTick(step)));
    }
    return group;
  }

  body() {
    if (this.stacks) return svg("g", {}, this.stacks.map((part) => this.bars(part)));
    const isSmooth = this.page.state.smoothing > 0;
    return svg("g", {}, this.drawn.map((curve) => {
      const band = this.bandOf(curve);
      const line = (values, extra) => svg("path", {
        d: this.linePath(curve.run.steps, values), class: `line ${extra}`,
        style: `stroke:${curve.color}`, "stroke-dasharray": curve.dash || null,
      });
      return [
        band && svg("path", { d: this.bandPath(curve.run.steps, curve.values, band), class: "band", style: `fill:${curve.color}` }),
        isSmooth && line(curve.values, "raw"),
        line(isSmooth ? curve.smooth : curve.values, ""),
      ].filter(Boolean);
    }));
  }

  // Gaps stay gaps; a point between two gaps becomes a dot (a line of no length with round ends).
  linePath(steps, values) {
    let path = "", isOpen = false;
    values.forEach((value, i) => {
      if (!isNumber(value)) { isOpen = false; return; }
      const point = `${this.x(steps[i]).toFixed(1)} ${this.y(value).toFixed(1)}`;
      path += isOpen ? `L${point}` : `M${point}h0`;
      isOpen = true;
    });
    return path;
  }

  bandPath(steps, values, std) {
    const rows = steps.map((step, i) => [step, values[i], std[i]]).filter(([, v, s]) => isNumber(v) && isNumber(s));
    const edge = (sign) => rows.map(([step, v, s]) => `${this.x(step).toFixed(1)} ${this.y(v + sign * s).toFixed(1)}`);
    return rows.length ? `M${edge(1).concat(edge(-1).reverse()).join("L")}Z` : "";
  }

  bars(part) {
    const width = Math.max(0.6, Math.min(26, (this.x(1) - this.x(0)) * 0.82));
    let path = "";
    for (const [step, [bottom, top]] of part.spans) {
      if (top > bottom) path += `M${(this.x(step) - width / 2).toFixed(1)} ${this.y(bottom).toFixed(1)}h${width.toFixed(1)}V${this.y(top).toFixed(1)}h${(-width).toFixed(1)}Z`;
    }
    return svg("path", { d: path, class: "bar", style: `fill:${part.color}` });
  }

  // What a line cannot show: values that are not finite, steps with warnings, the open step.
  marks() {
    const bottom = CHART_HEIGHT - MARGIN.bottom;
    const group = svg("g", { class: "marks" });
    for (const curve of this.drawn) curve.values.forEach((value, i) => {
      if (typeof value !== "string") return;
      const x = this.x(curve.run.steps[i]);
      group.append(svg("path", { d: `M${x - 3.5} ${bottom - 7}l7 7m-7 0l7-7`, class: "not-finite" },
        svg("title", {}, `${curve.label} is ${value} at step ${curve.run.steps[i]}`)));
    });
    for (const step of this.page.warningSteps()) {
      group.append(svg("path", { d: `M${this.x(step)} ${bottom - 1}l-3.5 6h7Z`, class: "warning-mark" },
        svg("title", {}, `warning at step ${step}`)));
    }
    const open = this.page.state.step;
    if (open !== null && open >= this.page.range.first && open <= this.page.range.last) {
      const x = this.x(open);
      group.append(svg("line", { x1: x, x2: x, y1: MARGIN.top, y2: bottom, class: "open-step" }),
        svg("path", { d: `M${x - 4} ${MARGIN.top - 7}h8l-4 6Z`, class: "open-step-head" }));
    }
    return group;
  }

  // ---- legend and crosshair -------------------------------------------------------------------

  drawLegend() {
    this.outputs = [];
    const parts = this.stacks;
    const labels = parts ? parts.map((part) => part.label) : this.spec.series.map(([, label]) => label);
    this.legend.replaceChildren(...labels.map((label, s) => {
      const curves = parts ? [parts[s]] : this.drawn.filter((curve) => curve.s === s);
      const values = curves.map((curve) => {
        const output = el("span", { class: "value" });
        this.outputs.push([curve, output]);
        return el("span", { class: "reading" }, swatch(curve), output);
      });
      return el("span", { class: "legend-item" }, el("span", { class: "label" }, label), ...values);
    }));
  }

  drawHover() {
    if (!this.width) return;
    const { hover, smoothing } = this.page.state;
    this.overlay.replaceChildren();
    const step = hover ?? this.page.range.last;
    for (const [curve, output] of this.outputs) {
      const value = this.valueAt(curve, step, hover === null);
      const isSmooth = smoothing > 0 && !this.stacks && isNumber(value);
      output.textContent = (isSmooth ? "≈ " : "") + formatNumber(value);
    }
    if (hover === null) return;
    const x = this.x(hover), bottom = CHART_HEIGHT - MARGIN.bottom;
    this.overlay.append(svg("line", { x1: x, x2: x, y1: MARGIN.top, y2: bottom, class: "crosshair" }));
    if (!this.stacks) for (const curve of this.drawn) {
      const i = curve.run.steps.indexOf(hover);
      const value = i < 0 ? null : (smoothing > 0 ? curve.smooth : curve.values)[i];
      if (isNumber(value)) this.overlay.append(svg("circle", { cx: x, cy: this.y(value), r: 4, class: "dot", style: `fill:${curve.color}` }));
    }
    const anchor = Math.min(Math.max(x, MARGIN.left + 18), this.width - MARGIN.right - 18);
    this.overlay.append(
      svg("rect", { x: anchor - 24, y: bottom + 3, width: 48, height: 18, rx: 4, class: "step-tag" }),
      svg("text", { x: anchor, y: bottom + 16, "text-anchor": "middle", class: "step-tag-text" }, String(hover)));
  }

  // What the line shows at a step; without a crosshair its last value.
  valueAt(curve, step, isLast) {
    if (curve.spans) {
      const span = curve.spans.get(isLast ? [...curve.spans.keys()].pop() : step);
      return span ? span[1] - span[0] : null;
    }
    const { steps } = curve.run;
    const i = isLast ? curve.values.findLastIndex((value) => value !== null) : steps.indexOf(step);
    return (this.page.state.smoothing > 0 ? curve.smooth[i] : null) ?? curve.values[i] ?? null;
  }

  // ---- input ----------------------------------------------------------------------------------

  stepAt(event) {
    const x = event.clientX - this.surface.getBoundingClientRect().left;
    return nearest(this.page.steps, this.stepFromX(x));
  }

  onKey(event) {
    const { steps, state } = this.page;
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) {
      const i = state.hover === null ? steps.length - 1 : steps.indexOf(state.hover) + move;
      this.page.hover(steps[Math.min(Math.max(i, 0), steps.length - 1)]);
    } else if (event.key === "Enter" && state.hover !== null) this.page.openStep(state.hover);
    else if (event.key === "Escape") this.page.hover(null);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

function swatch(curve) {
  return svg("svg", { class: "swatch", width: 18, height: 8, "aria-hidden": "true" },
    svg("path", { d: "M1 4H17", style: `stroke:${curve.color}`, "stroke-dasharray": curve.dash || null }));
}

// Exponential moving average that starts unbiased and steps over gaps.
function smoothed(values, weight) {
  let sum = 0, norm = 0;
  return values.map((value) => {
    if (!isNumber(value)) return null;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

// Phases on top of each other; what the total has beyond them is "other".
function stack(curves, totalKey, page) {
  const run = page.runs[page.state.run];
  const parts = curves.map((curve) => ({ label: curve.label, color: curve.color, dash: "", spans: new Map(), values: curve.values }));
  const other = { label: "other", color: "var(--muted-mark)", dash: "", spans: new Map(), values: [] };
  run.steps.forEach((step, i) => {
    let height = 0;
    for (const part of parts) {
      const value = part.values[i];
      if (!isNumber(value)) continue;
      part.spans.set(step, [height, height + value]);
      height += value;
    }
    const total = run.series[totalKey]?.[i];
    if (isNumber(total) && total > height) other.spans.set(step, [height, total]);
  });
  return other.spans.size ? [...parts, other] : parts;
}
