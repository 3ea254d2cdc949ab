// The sample browser: one step, one group, its members side by side.

class SampleBrowser {
  constructor(page) {
    this.page = page;
    this.parsed = new Map();
    this.bar = document.getElementById("sample-bar");
    this.summary = document.getElementById("step-summary");
    this.groupHead = document.getElementById("group-head");
    this.cards = document.getElementById("cards");
    this.buildBar();
  }

  get run() { return this.page.runs[this.page.state.run]; }

  // The data of the open step, parsed at its first use.
  get data() {
    const id = `samples-${this.page.state.run}-${this.page.state.step}`;
    if (!this.parsed.has(id)) this.parsed.set(id, readData(id));
    return this.parsed.get(id);
  }

  get group() {
    const groups = this.data?.groups ?? [];
    return groups.find((group) => group.group === this.page.state.group) ?? groups[0];
  }

  // ---- controls -------------------------------------------------------------------------------

  buildBar() {
    const { page } = this;
    const { state } = page;
    this.runSelect = el("select", { "aria-label": "Run", onchange: (event) => page.openRun(Number(event.target.value)) },
      page.runs.map((run, r) => el("option", { value: r }, run.name)));
    this.slider = el("input", { type: "range", min: 0, step: 1, "aria-label": "Step",
      oninput: (event) => page.showStep(this.run.sample_steps[Number(event.target.value)]) });
    this.stepSelect = el("select", { "aria-label": "Step", onchange: (event) => page.showStep(Number(event.target.value)) });
    this.groupSelect = el("select", { "aria-label": "Group",
      onchange: (event) => { state.group = Number(event.target.value); page.rememberPlace(); this.drawGroup(); } });
    this.sortSelect = el("select", { "aria-label": "Sort members by",
      onchange: (event) => { state.sort = event.target.value; this.drawGroup(); } },
      el("option", { value: "advantage" }, "best advantage first"), el("option", { value: "member" }, "member number"));
    this.search = el("input", { type: "search", placeholder: "Find text in this step", "aria-label": "Find text in this step",
      oninput: (event) => { state.query = event.target.value; this.drawGroups(); this.drawGroup(); } });
    this.tall = el("input", { type: "checkbox",
      onchange: (event) => this.cards.classList.toggle("tall", event.target.checked) });
    this.bar.append(
      page.runs.length > 1 ? el("label", {}, "Run ", this.runSelect) : "",
      el("div", { class: "stepper" },
        el("button", { "aria-label": "Previous step", title: "Previous step (←)", onclick: () => this.move(-1) }, "‹"),
        this.slider,
        el("button", { "aria-label": "Next step", title: "Next step (→)", onclick: () => this.move(1) }, "›"),
        el("label", {}, "Step ", this.stepSelect)),
      el("label", {}, "Group ", this.groupSelect),
      el("label", {}, "Order ", this.sortSelect),
      this.search,
      el("label", { class: "check" }, this.tall, " whole texts"));
  }

  move(direction) {
    const steps = this.run.sample_steps;
    const i = steps.indexOf(this.page.state.step) + direction;
    if (i >= 0 && i < steps.length) this.page.showStep(steps[i]);
  }

  // ---- drawing --------------------------------------------------------------------------------

  draw() {
    const { state } = this.page;
    const steps = this.run.sample_steps;
    this.runSelect.value = state.run;
    this.stepSelect.replaceChildren(...steps.map((step) => el("option", { value: step }, step)));
    this.slider.max = Math.max(steps.length - 1, 0);
    this.bar.classList.toggle("is-empty", !steps.length);
    if (!this.data) {
      this.summary.replaceChildren(el("p", { class: "empty" }, `No samples of ${this.run.name} are in this page.`));
      this.groupHead.replaceChildren();
      this.cards.replaceChildren();
      return;
    }
    this.stepSelect.value = state.step;
    this.slider.value = steps.indexOf(state.step);
    this.slider.setAttribute("aria-valuetext", `step ${state.step}`);
    this.drawSummary();
    this.drawGroups();
    this.drawGroup();
  }

  drawSummary() {
    const { state } = this.page;
    const i = this.run.steps.indexOf(state.step);
    const facts = [
      ["length reward", "reward/length"], ["writing reward", "reward/writing"], ["format reward", "reward/format"],
      ["words", "words/answer_mean"], ["truncated", "truncated_frac"], ["entropy", "entropy"], ["gradient norm", "grad_norm"],
    ].filter(([, key]) => i >= 0 && this.run.series[key]?.[i] !== undefined);
    const warnings = [state.step, state.missingStep].flatMap((step) =>
      (this.run.warnings[step] ?? []).map((text) => `Step ${step}: ${text}`));
    this.summary.replaceChildren(
      el("p", { class: "step-facts" }, el("strong", {}, `Step ${state.step}`),
        facts.map(([name, key]) => el("span", {}, `${name} `, el("b", {}, formatNumber(this.run.series[key][i]))))),
      ...(state.missingStep === null ? [] : [el("p", { class: "hint" },
        `Samples of step ${state.missingStep} are not in this page; step ${state.step} is the nearest.`)]),
      ...warnings.map((text) => el("p", { class: "warning", role: "note" }, text)));
  }

  drawGroups() {
    const { groups } = this.data;
    this.groupSelect.replaceChildren(...groups.map((group) => {
      const found = this.matching(group).length;
      const count = this.page.state.query ? `${found} of ${group.members.length}` : `${group.members.length} members`;
      return el("option", { value: group.group }, `${group.group} · ${count}`);
    }));
    if (this.group) this.groupSelect.value = this.group.group;
  }

  matching(group) {
    const query = this.page.state.query.trim().toLowerCase();
    if (!query) return group.members;
    return group.members.filter((member) => [member.answer, member.think, member.outline]
      .some((text) => text && text.toLowerCase().includes(query)));
  }

  drawGroup() {
    const { group } = this;
    if (!group) {
      this.groupHead.replaceChildren(el("p", { class: "empty" }, "This step has no samples."));
      this.cards.replaceChildren();
      return;
    }
    const members = [...this.matching(group)];
    if (this.page.state.sort === "advantage") members.sort((a, b) => (b.advantage ?? -Infinity) - (a.advantage ?? -Infinity));
    else members.sort((a, b) => a.member - b.member);
    this.groupHead.replaceChildren(promptPanel(group), this.wordsPlot(group));
    const scales = partScales(group.members);
    const query = this.page.state.query.trim();
    this.cards.replaceChildren(...members.map((member) => memberCard(member, group, scales, query)));
    this.cards.scrollLeft = 0;
    if (!members.length) {
      const others = this.data.groups.filter((other) => this.matching(other).length).map((other) => other.group);
      this.cards.append(el("p", { class: "empty" }, `“${query}” is not in this group's completions`
        + (others.length ? `; it is in group ${others.join(", ")}.` : ", nor in another group of this step.")));
    }
  }

  // Every member as a dot: words across, advantage up, the asked length as a band.
  wordsPlot(group) {
    const members = group.members.filter((m) => isNumber(m.words_answer) && isNumber(m.advantage));
    if (!members.length) return "";
    const width = 340, height = 190, left = 40, bottom = 30, top = 12;
    const [low, high] = group.length_range ?? [null, null];
    const xMax = Math.max(...members.map((m) => m.words_answer), high ?? 0) * 1.06 || 1;
    const yMax = Math.max(...members.map((m) => Math.abs(m.advantage)), 0.1) * 1.15;
    const x = (words) => left + (words / xMax) * (width - left - 10);
    const y = (advantage) => top + (height - top - bottom) * (1 - (advantage + yMax) / (2 * yMax));
    const dots = members.map((m) => svg("a", { href: `#member-${m.member}`, "aria-label": `member ${m.member}`,
      onclick: (event) => { event.preventDefault(); this.showMember(m.member); } },
      svg("circle", { cx: x(m.words_answer), cy: y(m.advantage), r: 5.5, class: m.advantage >= 0 ? "plus" : "minus" },
        svg("title", {}, `member ${m.member}: ${m.words_answer} words, advantage ${formatSigned(m.advantage)}`))));
    return el("figure", { class: "words-plot" },
      el("figcaption", {}, "Words × advantage", low === null ? "" : el("span", { class: "hint" }, " · band: the asked length")),
      svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "Words and advantage of each member" },
        low === null ? null : svg("rect", { x: x(low), y: top, width: Math.max(x(high) - x(low), 1), height: height - top - bottom, class: "range" }),
        svg("g", { class: "axes" },
          svg("line", { x1: left, x2: width - 10, y1: y(0), y2: y(0), class: "zero" }),
          ticks(0, xMax, 4).map((words) => svg("text", { x: x(words), y: height - 12, "text-anchor": "middle" }, formatTick(words))),
          ticks(-yMax, yMax, 4).map((value) => svg("text", { x: left - 7, y: y(value) + 4, "text-anchor": "end" }, formatTick(value)))),
        dots));
  }

  showMember(member) {
    const card = document.getElementById(`member-${member}`);
    if (!card) return;
    card.scrollIntoView({ behavior: scrollBehavior(), block: "nearest", inline: "center" });
    card.focus({ preventScroll: true });
  }
}

function promptPanel(group) {
  const range = group.length_range;
  return el("div", { class: "prompt" },
    el("p", { class: "chips" },
      range ? el("span", { class: "chip" }, `${range[0].toLocaleString("en")}–${range[1].toLocaleString("en")} words asked`)
        : el("span", { class: "chip" }, "no length asked"),
      group.language ? el("span", { class: "chip" }, group.language) : null,
      isNumber(group.prompt_row) ? el("span", { class: "chip" }, `prompt row ${group.prompt_row}`) : null,
      isNumber(group.num_prompt_tokens) ? el("span", { class: "chip" }, `${group.num_prompt_tokens} prompt tokens`) : null),
    el("div", { class: "request" }, group.prompt ?? ""),
    el("p", { class: "hint" }, groupSummary(group)),
    group.prompt_text ? fold("The prompt as the model read it", false, el("pre", {}, group.prompt_text)) : null);
}

// "8 members · 3 inside the range, 2 under, 3 over · 1 truncated · 1 failed reward"
function groupSummary({ members, length_range: range }) {
  const count = (test) => members.filter(test).length;
  const parts = [`${members.length} members`];
  if (range && members.some((m) => isNumber(m.words_answer))) {
    const under = count((m) => m.words_answer < range[0]), over = count((m) => m.words_answer > range[1]);
    const inside = count((m) => m.words_answer >= range[0] && m.words_answer <= range[1]);
    parts.push(`${inside} inside the range, ${under} under, ${over} over`);
  }
  const truncated = count((m) => m.truncated);
  if (truncated) parts.push(`${truncated} truncated`);
  const failed = count((m) => Object.values(m.rewards ?? {}).some((reward) => reward.raw === null));
  if (failed) parts.push(`${failed} with a failed reward`);
  return parts.join(" · ");
}
