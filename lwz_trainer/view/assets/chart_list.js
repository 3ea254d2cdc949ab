// Which metric is drawn where. A metric that no chart names is drawn under "Other metrics".

const CHART_SECTIONS = [
  {
    title: "Rewards",
    charts: [
      { title: "Length reward", unit: "mean ± std", series: [["reward/length", "mean"]], band: "reward/length_std" },
      { title: "Writing reward", unit: "mean ± std", series: [["reward/writing", "mean"]], band: "reward/writing_std" },
      { title: "Format reward", unit: "mean ± std", series: [["reward/format", "mean"]], band: "reward/format_std" },
      { title: "Structure", unit: "share", zero: true, series: [["reward/structure", "structure"], ["reward/strict_frac", "strictly formed"]] },
      { title: "Redundancy", unit: "share of paragraphs", zero: true, series: [["reward/redundancy", "repeated"]] },
      { title: "Signal in groups", unit: "share", zero: true, series: [["distinct_frac", "distinct samples"], ["zero_spread_frac", "groups without spread"]] },
      { title: "Failed rewards", unit: "share", zero: true, series: [["reward/length_failed_frac", "length"], ["reward/writing_failed_frac", "writing"], ["reward/format_failed_frac", "format"]] },
      { title: "Failed reward workers", unit: "per step", zero: true, series: [["reward/worker_failures", "failed"]] },
    ],
  },
  {
    title: "Lengths",
    charts: [
      { title: "Words", unit: "mean", zero: true, series: [["words/answer_mean", "answer"], ["words/think_mean", "thinking"]] },
      { title: "Completion", unit: "tokens", zero: true, series: [["tokens/completion_mean", "mean"], ["tokens/completion_mean_untruncated", "mean, not truncated"], ["tokens/completion_max", "longest"]] },
      { title: "Truncated", unit: "share", zero: true, series: [["truncated_frac", "truncated"]] },
    ],
  },
  {
    title: "Policy",
    charts: [
      { title: "Entropy", unit: "nats per token", series: [["entropy", "entropy"]] },
      { title: "KL to the reference", unit: "nats per token", zero: true, series: [["kl", "KL"]] },
      { title: "Clipped tokens", unit: "share", zero: true, series: [["clip_frac_low", "below"], ["clip_frac_high", "above"]] },
      { title: "Ratio, mean", unit: "new ÷ old", series: [["ratio_mean", "mean"]] },
      { title: "Ratio, largest", unit: "new ÷ old", series: [["ratio_max", "largest"]] },
      { title: "Sampler vs. trainer, mean", unit: "difference", zero: true, series: [["sampler/logprob_diff_mean", "log-prob, nats"], ["sampler/prob_diff_mean", "probability"]] },
      { title: "Sampler vs. trainer, largest", unit: "nats", zero: true, series: [["sampler/logprob_diff_max", "log-prob"]] },
      { title: "Effective sample size", unit: "share", series: [["sampler/ess_frac", "effective"]] },
    ],
  },
  {
    title: "Optimisation",
    charts: [
      { title: "Loss", unit: "", series: [["loss", "loss"]] },
      { title: "Gradient norm", unit: "", zero: true, series: [["grad_norm", "norm"]] },
      { title: "Learning rate", unit: "", zero: true, series: [["lr", "rate"]] },
    ],
  },
  {
    title: "Speed and memory",
    charts: [
      { title: "Step time", unit: "seconds", stacked: true, total: "time/step_s", series: [["time/rollout_s", "rollout"], ["time/reward_s", "rewards"], ["time/update_s", "update"]] },
      { title: "Rollout speed", unit: "tokens/s", zero: true, series: [["rollout/tokens_per_s", "sampled"]] },
      { title: "Longest sample", unit: "tokens/s", zero: true, series: [["rollout/longest_tokens_per_s", "longest"]] },
      { title: "Rows in flight", unit: "sequences", zero: true, series: [["rollout/rows_in_flight", "mean"]] },
      { title: "Decode bandwidth", unit: "share of a copy's", zero: true, series: [["rollout/bandwidth_frac", "weights, keys and values"]] },
      { title: "Update speed", unit: "tokens/s", zero: true, series: [["update/tokens_per_s", "trained"]] },
      { title: "Prefilled", unit: "tokens per step", zero: true, series: [["rollout/prefill_tokens", "prefilled"]] },
      { title: "Peak memory", unit: "GB", zero: true, series: [["memory/peak_gb", "peak"]] },
      { title: "Held in the rollout", unit: "GB", zero: true, series: [["memory/rollout_kv_cache_gb", "KV cache"], ["memory/rollout_gradients_gb", "gradients"], ["memory/rollout_torch_reserved_gb", "torch"], ["memory/rollout_driver_free_gb", "free"]] },
      { title: "Held in the update", unit: "GB", zero: true, series: [["memory/update_gradients_gb", "gradients"], ["memory/update_optimizer_gb", "optimizer"], ["memory/update_torch_reserved_gb", "torch"], ["memory/update_driver_free_gb", "free"]] },
      { title: "Memory switches", unit: "seconds", zero: true, series: [["memory/to_rollout_s", "to the rollout"], ["memory/to_update_s", "to the update"]] },
      { title: "KV cache in use", unit: "share", zero: true, series: [["rollout/kv_used_frac", "used"]] },
      { title: "Preemptions", unit: "per step", zero: true, series: [["rollout/preemptions", "preempted"]] },
    ],
  },
];

// The sections that have something to show for these runs, with "Other metrics" at the end.
function chartSections(runs) {
  const present = new Set(runs.flatMap((run) => Object.keys(run.series)));
  const named = new Set(["policy_version"]);
  const sections = CHART_SECTIONS.map((section) => ({
    title: section.title,
    charts: section.charts.flatMap((chart) => {
      for (const key of [...chart.series.map(([key]) => key), chart.band, chart.total]) named.add(key);
      const series = chart.series.filter(([key]) => present.has(key));
      return series.length ? [{ ...chart, series }] : [];
    }),
  }));
  const rest = { title: "Other metrics", charts: [] };
  for (const key of [...present].sort()) {
    if (named.has(key) || isStdOfPresent(key, present)) continue;
    const section = key.startsWith("reward/") ? sections[0] : rest;
    section.charts.push({ title: key, unit: "", series: [[key, "value"]], band: `${key}_std` });
  }
  return [...sections, rest].filter((section) => section.charts.length);
}

function isStdOfPresent(key, present) {
  return key.endsWith("_std") && present.has(key.slice(0, -"_std".length));
}
