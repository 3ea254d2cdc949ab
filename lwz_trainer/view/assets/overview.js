// The top of the page: which run this is, what it learned, its settings, what is worth a warning.

// Settings worth a place in the header, by the last part of their dotted name.
const KEY_SETTINGS = [
  "group_size", "prompts_per_step", "num_steps", "steps", "max_completion_tokens", "max_new_tokens",
  "max_tokens", "temperature", "top_p", "lr", "learning_rate", "clip_ratio_low", "clip_ratio_high",
  "kl_coef", "normalization", "seed",
];
const CHANGE_NAMES = {
  "reward/length": "Length reward",
  "reward/writing": "Writing reward",
  "reward/format": "Format reward",
  "reward/structure": "Structure",
  "reward/strict_frac": "Strictly formed",
  "reward/redundancy": "Redundancy",
  "words/answer_mean": "Words in the answer",
  "truncated_frac": "Truncated",
};

function drawHeader(page) {
  const { runs } = page;
  document.getElementById("header").append(
    el("p", { class: "eyebrow" }, runs.length > 1 ? `${runs.length} training runs` : "Training run"),
    el("h1", {}, runs.length > 1 ? runs.map((run) => run.name).join(" · ") : runs[0].name),
    el("dl", { class: "facts" }, runFacts(runs).map(([name, value]) =>
      el("div", {}, el("dt", {}, name), el("dd", { title: value }, value)))),
    learnedCards(runs),
    el("div", { class: "folds" }, notesFold(runs), warningsFold(page), differencesFold(runs), settingsFold(runs)));
}

function runFacts(runs) {
  const [run] = runs;
  const facts = [];
  const model = run.settings["model.path"] ?? run.settings["model"];
  if (model) facts.push(["model", model]);
  if (run.steps.length) facts.push(["recorded", `steps ${run.steps[0]}–${run.steps[run.steps.length - 1]}`]);
  const seconds = (run.series["time/step_s"] ?? []).filter(isNumber).reduce((sum, s) => sum + s, 0);
  if (seconds) facts.push(["time in steps", formatDuration(seconds)]);
  for (const leaf of KEY_SETTINGS) {
    const key = Object.keys(run.settings).find((name) => name.split(".").pop() === leaf);
    if (!key) continue;
    const values = new Set(runs.map((other) => other.settings[key] ?? "–"));
    facts.push([leaf.replaceAll("_", " "), [...values].join(" | ")]);
  }
  return facts;
}

function learnedCards(runs) {
  const order = Object.keys(CHANGE_NAMES);
  const keys = [...new Set(runs.flatMap((run) => run.learned.map((change) => change.key)))];
  const rank = (key) => (order.includes(key) ? order.indexOf(key) : order.length);
  keys.sort((a, b) => rank(a) - rank(b));
  if (!keys.length) return null;
  const window = Math.max(...runs.flatMap((run) => run.learned.map((change) => change.window)));
  return el("section", { class: "learned", "aria-label": "What was learned" },
    el("h2", {}, "What was learned", el("span", { class: "hint" },
      ` mean of the first ${window} → last ${window} steps; a change within two standard errors is called unclear`)),
    el("div", { class: "learned-grid" }, keys.map((key) => el("div", { class: "learned-card" },
      el("h3", {}, CHANGE_NAMES[key] ?? key),
      runs.map((run, r) => changeRow(run.learned.find((change) => change.key === key), run, r, runs.length))))));
}

function changeRow(change, run, r, numRuns) {
  if (!change) return null;
  const { first, last, direction, good } = change;
  const quality = direction === "unclear" || !good ? "neutral" : direction === good ? "better" : "worse";
  const arrow = { up: "▲", down: "▼", unclear: "≈" }[direction];
  return el("div", { class: "change", title: `${run.name}: standard error ±${formatNumber(change.standard_error)}` },
    numRuns > 1 ? el("span", { class: "run-dot", style: `background:var(--c${r % 8})` }) : null,
    el("span", { class: "from" }, formatNumber(first)), el("span", { class: "to-arrow" }, "→"),
    el("span", { class: "to" }, formatNumber(last)),
    el("span", { class: `delta ${quality}` },
      direction === "unclear" ? `${arrow} unclear` : `${arrow} ${formatNumber(Math.abs(last - first))}`));
}

function fold(title, isOpen, ...content) {
  return el("details", { class: "fold", open: isOpen }, el("summary", {}, title), ...content);
}

function notesFold(runs) {
  const notes = runs.flatMap((run) => run.notes.map((note) => (runs.length > 1 ? `${run.name}: ${note}` : note)));
  if (!notes.length) return null;
  return fold(`Notes on this page (${notes.length})`, false, el("ul", {}, notes.map((note) => el("li", {}, note))));
}

function warningsFold(page) {
  const rows = page.runs.flatMap((run, r) => Object.entries(run.warnings).flatMap(([step, texts]) =>
    texts.map((text) => ({ run, r, step: Number(step), text }))));
  if (!rows.length) return null;
  return fold(el("span", { class: "warning-title" }, `Warnings (${rows.length})`), false,
    el("ul", { class: "warning-list" }, rows.map(({ run, r, step, text }) => el("li", {},
      el("button", { class: "link", onclick: () => page.openStep(step, r) },
        page.runs.length > 1 ? `${run.name}, step ${step}` : `step ${step}`), ` ${text}`))));
}

function differencesFold(runs) {
  if (runs.length < 2) return null;
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const different = keys.filter((key) => new Set(runs.map((run) => run.settings[key])).size > 1);
  const text = different.length ? `Settings that differ (${different.length})` : "All settings are the same";
  return fold(text, different.length > 0 && different.length <= 6, settingsTable(runs, different));
}

function settingsFold(runs) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  return keys.length ? fold(`All settings (${keys.length})`, false, settingsTable(runs, keys)) : null;
}

function settingsTable(runs, keys) {
  return el("div", { class: "table-scroll" }, el("table", { class: "settings" },
    runs.length > 1 ? el("thead", {}, el("tr", {}, el("th", {}), runs.map((run) => el("th", { scope: "col" }, run.name)))) : null,
    el("tbody", {}, keys.map((key) => el("tr", {},
      el("th", { scope: "row" }, key), runs.map((run) => el("td", {}, run.settings[key] ?? "–")))))));
}
