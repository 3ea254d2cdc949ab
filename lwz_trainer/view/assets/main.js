// Puts the page together and holds its only state.

function startPage() {
  const { runs } = readData("curves");
  const steps = [...new Set(runs.flatMap((run) => run.steps))].sort((a, b) => a - b);
  const state = { hover: null, smoothing: 0, hidden: new Set(), run: 0, step: null, missingStep: null, group: null, sort: "advantage", query: "" };
  const page = { runs, steps, state, range: { first: steps[0] ?? 0, last: steps[steps.length - 1] ?? 0 } };
  let charts = [];
  let isHoverPending = false;

  page.hover = (step) => {
    if (step === state.hover) return;
    state.hover = step;
    if (isHoverPending) return;
    isHoverPending = true;
    requestAnimationFrame(() => {
      isHoverPending = false;
      document.getElementById("hover-step").textContent = state.hover === null ? "" : `step ${state.hover}`;
      for (const chart of charts) chart.drawHover();
    });
  };
  page.redrawCharts = () => { for (const chart of charts) chart.draw(); };
  page.warningSteps = () => [...new Set(runs.flatMap((run, r) => (state.hidden.has(r) ? [] : Object.keys(run.warnings).map(Number))))];

  // Shows a step's samples; where they are not in the page, the nearest step's.
  page.showStep = (step) => {
    const shown = nearest(runs[state.run].sample_steps, step);
    state.missingStep = shown === step ? null : step;
    state.step = shown;
    page.rememberPlace();
    page.browser.draw();
    page.redrawCharts();
  };
  page.openStep = (step, run = state.run) => {
    if (step === null) return;
    state.run = run;
    page.showStep(step);
    const samples = document.getElementById("samples");
    samples.focus({ preventScroll: true });
    samples.scrollIntoView({ behavior: scrollBehavior() });
  };
  page.openRun = (run) => {
    state.run = run;
    page.showStep(state.step ?? page.range.last);
  };

  // The address names the open place, so that a link to it can be sent.
  page.rememberPlace = () => {
    const named = Object.entries({ run: state.run, step: state.step, group: state.group });
    const place = new URLSearchParams(named.filter(([, value]) => value !== null));
    history.replaceState(null, "", `#${place}`);
  };
  const recallPlace = () => {
    const place = new URLSearchParams(location.hash.slice(1));
    const read = (name) => (/^\d+$/.test(place.get(name) ?? "") ? Number(place.get(name)) : null);
    state.run = Math.min(read("run") ?? 0, runs.length - 1);
    state.group = read("group");
    const sampleSteps = runs[state.run].sample_steps;
    state.step = nearest(sampleSteps, read("step") ?? page.range.last);
  };

  recallPlace();
  drawHeader(page);
  charts = drawCharts(page);
  drawRunLegend(page);
  page.browser = new SampleBrowser(page);
  page.browser.draw();
  connectSmoothing(page);
  document.addEventListener("keydown", (event) => {
    const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const isTaken = event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, select, textarea, .cards, .answer, .token-ids");
    if (direction && !isTaken) { event.preventDefault(); page.browser.move(direction); }
  });
}

function drawCharts(page) {
  const charts = [];
  const links = document.getElementById("section-links");
  const sections = page.steps.length ? chartSections(page.runs) : [];
  for (const section of sections) {
    const id = section.title.toLowerCase().replaceAll(" ", "-");
    const made = section.charts.map((spec) => new Chart(spec, page));
    charts.push(...made);
    links.append(sectionLink(id, section.title));
    document.getElementById("charts").append(el("section", { class: "chart-section", id, "aria-label": section.title },
      el("div", { class: "section-title" }, el("h2", {}, section.title)),
      el("div", { class: "chart-grid" }, made.map((chart) => chart.element))));
  }
  if (!sections.length) document.getElementById("charts").append(el("p", { class: "empty" }, "No step has been recorded yet."));
  links.append(sectionLink("samples", "Samples"));
  return charts;
}

// Scrolls without touching the address, which names the open sample.
function sectionLink(id, title) {
  return el("a", { href: `#${id}`, onclick: (event) => {
    event.preventDefault();
    document.getElementById(id).scrollIntoView({ behavior: scrollBehavior() });
  } }, title);
}

function drawRunLegend(page) {
  if (page.runs.length < 2) return;
  const { hidden } = page.state;
  document.getElementById("run-legend").append(...page.runs.map((run, r) => el("button", {
    class: "run-button", "aria-pressed": "true", title: "Show or hide this run in the charts",
    onclick: (event) => {
      if (!hidden.delete(r)) hidden.add(r);
      event.currentTarget.setAttribute("aria-pressed", String(!hidden.has(r)));
      page.redrawCharts();
    },
  }, el("span", { class: "run-dot", style: `background:var(--c${r % 8})` }), run.name)));
}

function connectSmoothing(page) {
  const slider = document.getElementById("smoothing");
  slider.addEventListener("input", () => {
    page.state.smoothing = Number(slider.value);
    document.getElementById("smoothing-value").textContent = page.state.smoothing ? page.state.smoothing.toFixed(2) : "off";
    page.redrawCharts();
  });
}

startPage();
