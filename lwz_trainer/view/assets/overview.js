// The top of the page: which run this is, what it learned, its settings, what is worth a warning.

// Settings worth a place in the header, where a run has them.
const KEY_SETTINGS = [
  "data.prompts_per_step", "rollout.group_size", "rollout.max_completion_tokens", "rollout.temperature",
  "optim.lr", "update.normalizer", "update.clip_ratio_low", "update.clip_ratio_high", "update.kl_coef",
  "rewards.normalization", "seed",
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
  const facts = [];
  const add = (name, read) => {
    const values = new Set(runs.map(read).filter(Boolean));
    if (values.size) facts.push([name, [...values].join(" | ")]);
  };
  add("model", (run) => run.settings["model.path"]);
  add("recorded", (run) => run.steps.length && `steps ${run.steps[0]}–${run.steps[run.steps.length - 1]}`);
  add("time in steps", (run) => {
    const seconds = (run.series["time/step_s"] ?? []).filter(isNumber).reduce((sum, s) => sum + s, 0);
    return seconds && formatDuration(seconds);
  });
  for (const key of KEY_SETTINGS) add(key.split(".").pop().replaceAll("_", " "), (run) => run.settings[key]);
  return facts;
}

function learnedCards(runs) {
  const order = Object.keys(CHANGE_NAMES);
  const keys = [...new Set(runs.flatMap((run) => run.learned.map((change) => change.key)))];
  const rank = (key) => (order.includes(key) ? order.indexOf(key) : order.length);
  keys.sort((a, b) => rank(a) - rank(b));
  if (!keys.length) return null;
  return el("section", { class: "learned", "aria-label": "What was learned" },
    el("h2", {}, "What was learned", el("span", { class: "hint" },
      " mean of the first five → last five steps (fewer in a short run); a change within two standard errors is called unclear")),
    el("div", { class: "learned-grid" }, keys.map((key) => el("div", { class: "learned-card" },
      el("h3", {}, CHANGE_NAMES[key] ?? key),
      runs.map((run, r) => changeRow(run.learned.find((change) => change.key === key), run, r, runs.length))))));
}

function changeRow(change, run, r, numRuns) {
  if (!change) return null;
  const { first, last, direction, good } = change;
  const isMove = direction === "up" || direction === "down";
  const quality = !isMove || !good ? "neutral" : direction === good ? "better" : "worse";
  const arrow = { up: "▲", down: "▼", unclear: "≈", same: "=" }[direction];
  return el("div", { class: "change", title: `${run.name}: standard error ±${formatNumber(change.standard_error)}` },
    numRuns > 1 ? el("span", { class: "run-dot", style: `background:var(--c${r % 8})` }) : null,
    el("span", { class: "from" }, formatNumber(first)), el("span", { class: "to-arrow" }, "→"),
    el("span", { class: "to" }, formatNumber(last)),
    el("span", { class: `delta ${quality}` },
      `${arrow} ${isMove ? formatNumber(Math.abs(last - first)) : direction}`));
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
