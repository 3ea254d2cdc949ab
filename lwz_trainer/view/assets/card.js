// One member of a group: how it was rewarded, and what it wrote.

const PARTS = [["raw", "raw"], ["normalized", "normalised"], ["weighted", "weighted"]];

// The largest size of each reward part in the group, so that bars compare across its cards.
function partScales(members) {
  const scales = { raw: 1, normalized: 1, weighted: 0.1 };
  for (const member of members) for (const reward of Object.values(member.rewards ?? {})) {
    for (const part of Object.keys(scales)) scales[part] = Math.max(scales[part], Math.abs(reward[part] ?? 0));
  }
  return scales;
}

function memberCard(member, group, scales, query) {
  return el("article", { class: "card", id: `member-${member.member}`, role: "listitem", tabindex: -1 },
    el("header", {},
      el("h4", {}, `Member ${member.member}`),
      el("span", { class: `advantage ${advantageClass(member.advantage)}`, title: "advantage" },
        "A ", formatSigned(member.advantage))),
    el("p", { class: "chips" }, finishChips(member)),
    rewardTable(member.rewards ?? {}, scales),
    wordsBar(member, group.length_range),
    thinkingFold(member, query),
    el("div", { class: "answer", lang: group.language ?? null, tabindex: 0, "aria-label": `Answer of member ${member.member}` },
      member.answer ? markedText(member.answer, member.repeated_spans ?? [], query)
        : el("p", { class: "empty" }, "There is no answer in this completion.")),
    outsideFold(member),
    tokensFold(member));
}

function advantageClass(advantage) {
  if (!isNumber(advantage) || Math.abs(advantage) < 0.005) return "zero";
  return (advantage > 0 ? "plus" : "minus") + (Math.abs(advantage) >= 0.75 ? " strong" : "");
}

function finishChips(member) {
  const chips = [];
  if (member.truncated) chips.push(el("span", { class: "chip bad" }, "truncated"));
  if (member.finish_reason) {
    const at = member.stop_string ? ` at ${member.stop_string}` : "";
    chips.push(el("span", { class: "chip" }, `finish: ${member.finish_reason}${at}`));
  }
  if (isNumber(member.structure)) {
    chips.push(el("span", { class: member.structure < 1 ? "chip bad" : "chip" }, `structure ${formatNumber(member.structure)}`));
  }
  if (isNumber(member.redundancy)) {
    chips.push(el("span", { class: member.redundancy > 0.1 ? "chip bad" : "chip" }, `redundancy ${formatNumber(member.redundancy)}`));
  }
  return chips;
}

function rewardTable(rewards, scales) {
  const names = Object.keys(rewards);
  if (!names.length) return null;
  return el("table", { class: "rewards" },
    el("thead", {}, el("tr", {}, el("th", {}, el("span", { class: "hidden" }, "reward")), PARTS.map(([, label]) => el("th", { scope: "col" }, label)))),
    el("tbody", {}, names.map((name) => el("tr", {}, el("th", { scope: "row" }, name),
      PARTS.map(([part]) => el("td", {}, partBar(rewards[name][part], scales[part], part === "raw")))))));
}

// A raw reward grows from the left where all are positive; the others from the middle.
function partBar(value, scale, isRaw) {
  if (value === undefined) return el("span", { class: "number" }, "–");
  if (value === null) return el("span", { class: "number failed", title: "not a number: this reward failed, and is not counted" }, "failed");
  const share = Math.min(Math.abs(value) / scale, 1) * 100;
  const fromMiddle = !isRaw || value < 0;
  const style = fromMiddle
    ? `width:${share / 2}%;${value < 0 ? "right:50%" : "left:50%"}`
    : `width:${share}%;left:0`;
  const kind = isRaw && value >= 0 ? "raw" : value < 0 ? "minus" : "plus";
  return [
    el("span", { class: `track ${fromMiddle ? "middle" : ""}` }, el("span", { class: `fill ${kind}`, style })),
    el("span", { class: "number" }, isRaw ? formatNumber(value) : formatSigned(value)),
  ];
}

function wordsBar(member, range) {
  const words = member.words_answer;
  if (!isNumber(words)) return null;
  if (!range) return el("p", { class: "words" }, el("b", {}, words.toLocaleString("en")), " words");
  const [low, high] = range;
  const end = Math.max(high * 1.5, words * 1.05, 1);
  const place = words < low ? "under" : words > high ? "over" : "inside";
  const distance = { under: `${(low - words).toLocaleString("en")} under`, over: `${(words - high).toLocaleString("en")} over`, inside: "inside" }[place];
  return el("div", { class: `words ${place}` },
    el("p", {}, el("b", {}, words.toLocaleString("en")), ` words · ${distance} `,
      el("span", { class: "hint" }, `${low.toLocaleString("en")}–${high.toLocaleString("en")}`)),
    el("div", { class: "words-track", "aria-hidden": "true" },
      el("span", { class: "asked", style: `left:${(low / end) * 100}%;width:${((high - low) / end) * 100}%` }),
      el("span", { class: "marker", style: `left:${(words / end) * 100}%` })));
}

function thinkingFold(member, query) {
  if (!member.think) return null;
  const words = isNumber(member.words_think) ? ` (${member.words_think.toLocaleString("en")} words)` : "";
  const isFound = query !== "" && member.think.toLowerCase().includes(query.toLowerCase());
  return fold(`Thinking${words}`, isFound, el("div", { class: "thinking" }, markedText(member.think, [], query)));
}

// Text as nodes, with repeated passages and search hits marked.
function markedText(text, repeatedSpans, query) {
  const spans = repeatedSpans.map(([start, end]) => ({ start, end, kind: "repeated" }));
  if (query) {
    const lower = text.toLowerCase(), needle = query.toLowerCase();
    for (let at = lower.indexOf(needle); at >= 0; at = lower.indexOf(needle, at + needle.length)) {
      spans.push({ start: at, end: at + needle.length, kind: "hit" });
    }
  }
  const edges = [...new Set([0, text.length, ...spans.flatMap((s) => [s.start, s.end])])].sort((a, b) => a - b);
  const nodes = [];
  for (let i = 0; i + 1 < edges.length; i++) {
    const piece = text.slice(edges[i], edges[i + 1]);
    const kinds = spans.filter((s) => s.start <= edges[i] && s.end >= edges[i + 1]).map((s) => s.kind);
    nodes.push(kinds.length ? el("mark", { class: [...new Set(kinds)].join(" "), title: kinds.includes("repeated") ? "repeats an earlier passage" : null }, piece) : piece);
  }
  return nodes;
}

function outsideFold(member) {
  if (!member.outline) return null;
  const tidy = "<think>[thinking]</think><answer>[answer]</answer>";
  const squeezed = member.outline.replace(/\s+/g, "");
  if (tidy.startsWith(squeezed) && squeezed.includes("[answer]")) return null;
  return fold("Tags and stray text", false, el("pre", {}, member.outline));
}

function tokensFold(member) {
  const facts = [
    ["completion tokens", member.num_completion_tokens],
    ["log-prob, mean", member.logprob_mean],
    ["perplexity", isNumber(member.logprob_mean) ? Math.exp(-member.logprob_mean) : undefined],
    ["log-prob, lowest", member.logprob_min],
    ["policy version", member.policy_version],
  ].filter(([, value]) => value !== undefined && value !== null);
  if (!facts.length && !member.ids) return null;
  const count = isNumber(member.num_completion_tokens) ? ` (${member.num_completion_tokens.toLocaleString("en")})` : "";
  const details = fold(`Tokens${count}`, false);
  details.addEventListener("toggle", () => {
    if (details.childElementCount > 1) return;
    details.append(
      el("dl", { class: "token-facts" }, facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, formatNumber(value))))),
      ...[profilePlot(member), leastLikely(member), tokenList(member)].filter(Boolean));
  });
  return details;
}

function profilePlot(member) {
  const profile = (member.logprob_profile ?? []).filter(isNumber);
  if (profile.length < 2) return null;
  const width = 300, height = 56;
  const low = Math.min(...profile, -0.1);
  const points = profile.map((p, i) => `${((i / (profile.length - 1)) * width).toFixed(1)} ${(3 + (p / low) * (height - 6)).toFixed(1)}`);
  return el("figure", { class: "profile" },
    svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": "Mean log-probability along the completion" },
      svg("path", { d: `M${points.join("L")}` })),
    el("figcaption", {}, `log-probability from the first to the last token; top is 0, bottom ${formatNumber(low)}`));
}

function leastLikely(member) {
  if (!member.least_likely?.length) return null;
  return el("div", { class: "table-scroll" }, el("table", { class: "settings" },
    el("thead", {}, el("tr", {}, ["least likely at", "token id", "log-prob"].map((label) => el("th", { scope: "col" }, label)))),
    el("tbody", {}, member.least_likely.map(([at, id, logprob]) => el("tr", {}, [at, id ?? "–", formatNumber(logprob)].map((value) => el("td", {}, value)))))));
}

// Ids shaded by surprise: the less likely the sampled token, the stronger the shade.
function tokenList(member) {
  if (!member.ids) return null;
  const shade = (i) => Math.min(Math.abs(member.logprobs?.[i] ?? 0) / 6, 1) * 60;
  return el("div", { class: "token-ids", tabindex: 0, "aria-label": "Token ids" }, member.ids.map((id, i) => [
    el("span", { style: `background:color-mix(in srgb, var(--minus) ${shade(i).toFixed(0)}%, transparent)`, title: isNumber(member.logprobs?.[i]) ? `${i}: ${member.logprobs[i]}` : null }, id), " "]));
}
