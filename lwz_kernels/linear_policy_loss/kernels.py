"""The fused row kernel of the policy loss: statistics, objective and gradient of a row in one pass.

One program reads its row once for the log-prob, the entropy and the log-sum-exp, knows dL/dlogprob
from them and from the token's own numbers, and reads the row again, out of L2, to overwrite it with
dL/dlogits. Only for objectives in which a token's coefficient needs nothing but its own row; the
others run `row_statistics`, their sequence arithmetic, and `write_dlogits_`.

Loss values and metrics are computed by `objective.py` from the vectors that the kernel leaves.
Natural log; accumulators have the type of the logits.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lwz_kernels.linear_policy_loss.config import PolicyLossConfig
from lwz_kernels.linear_policy_loss.objective import ObjectiveRows, is_token_level
from lwz_kernels.loss_head.torch_rows import narrow_view
from lwz_kernels.loss_head.triton_rows import (
    BLOCK_V,
    NUM_WARPS,
    check_logits,
    label_logit,
    scan_row,
    write_row,
)

__all__ = ["policy_loss_rows"]

# The kernel's three kinds of surrogate; normalisers arrive in the weights. The last three types
# get here on-policy only, where their sequence-level ratio is 1 and vespo's weight too.
_SURROGATES = {
    "grpo": "clip",
    "bnpo": "clip",
    "dr_grpo": "clip",
    "dapo": "clip",
    "cispo": "detached",
    "sapo": "sapo",
    "gspo": "clip",
    "luspo": "clip",
    "vespo": "detached",
}


def policy_loss_rows(
    logits_CV: Tensor,
    labels_C: Tensor,
    temperature_C: Tensor,
    entropy_weights_C: Tensor | None,
    rows: ObjectiveRows,
    config: PolicyLossConfig,
    *,
    logit_scale: float,
    softcap: float | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Turns a chunk of logits into dL/dlogits in place, with L's token-level policy objective.

    Args:
        logits_CV: [C, V] fp32 (fp64), unit stride along V; overwritten.
        labels_C: [C] int64 in [0, V).
        temperature_C: [C], dtype of the logits.
        entropy_weights_C: [C] weights w of the entropy bonus, −Σ w·entropy in the loss, or None.
        rows: the token's own numbers, each [C], dtype of the logits.
        config: one for which `is_token_level` holds.
        logit_scale, softcap: z = softcap · tanh(logit_scale · x / softcap) / temperature.

    Returns:
        dlogits [C, V] as `out_dtype` in the storage of the logits, and logprobs, entropy, lse and
        dL/dlogprob, each [C].

    Raises:
        ValueError: the objective needs whole sequences, or a tensor that is missing.
    """
    num_rows, vocab_size = check_logits(logits_CV)
    switches = _switches(config, rows)
    dlogits_CV = narrow_view(logits_CV, out_dtype)
    out_4C = logits_CV.new_empty(4, num_rows)
    if num_rows:
        with torch.cuda.device_of(logits_CV):
            policy_loss_rows_kernel[(num_rows,)](
                logits_CV,
                labels_C.contiguous(),
                temperature_C.contiguous(),
                _dense(entropy_weights_C),
                rows.advantages.contiguous(),
                rows.weights.contiguous(),
                _dense(rows.policy_mask),
                _dense(rows.old_logprobs),
                _dense(rows.ref_logprobs) if switches["KL"] else None,
                _dense(rows.sampling_logprobs) if switches["SAMPLER"] else None,
                _settings(config, logits_CV.dtype, logits_CV.device),
                dlogits_CV,
                out_4C,
                logits_CV.stride(0),
                dlogits_CV.stride(0),
                num_rows,
                vocab_size,
                LOGIT_SCALE=float(logit_scale),
                SOFTCAP=softcap,
                BLOCK_V=BLOCK_V,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
                **switches,
            )
    logprobs_C, entropy_C, lse_C, dlogprobs_C = out_4C
    return dlogits_CV, logprobs_C, entropy_C, lse_C, dlogprobs_C


def _switches(config: PolicyLossConfig, rows: ObjectiveRows) -> dict[str, str | bool]:
    """What is compiled in; values live in `_settings`, so that a schedule compiles nothing."""
    is_token = is_token_level(
        config,
        is_on_policy=rows.old_logprobs is None,
        has_policy_mask=rows.policy_mask is not None,
    )
    if not is_token:
        raise ValueError(
            f"loss_type={config.loss_type!r} with these settings needs whole sequences: use "
            "row_statistics, sequence_objective and write_dlogits_"
        )
    has_kl = config.kl_coef != 0
    if has_kl and rows.ref_logprobs is None:
        raise ValueError(f"kl_coef={config.kl_coef} needs ref_logprobs, got None")
    if config.sampler_correction and rows.sampling_logprobs is None:
        raise ValueError(
            f"sampler_correction={config.sampler_correction!r} needs sampling_logprobs, got None"
        )
    return {
        "SURROGATE": _SURROGATES[config.loss_type],
        "KL": config.kl_estimator if has_kl else "",
        "KL_IMPORTANCE": config.kl_importance_correction,
        "SAMPLER": config.sampler_correction or "",
    }


@functools.lru_cache(maxsize=64)
def _settings(config: PolicyLossConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The configuration's numbers on the device, as `token_coefficient` reads them.

    Python floats would become fp64 arguments under torch.compile, and constants would compile a
    kernel for every value of a schedule.
    """
    delta = config.clip_ratio_delta
    numbers = (
        1 - config.clip_ratio_low,
        1 + config.clip_ratio_high,
        math.inf if delta is None else delta,
        config.cispo_ratio_max,
        config.sapo_temperature_pos,
        config.sapo_temperature_neg,
        config.kl_coef,
        config.sampler_ratio_min,
        config.sampler_ratio_max,
    )
    return torch.tensor(numbers, dtype=dtype, device=device)


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


@triton.jit
def policy_loss_rows_kernel(
    p_x,
    p_label,
    p_temperature,
    p_entropy_weight,
    p_advantage,
    p_weight,
    p_policy_mask,
    p_old,
    p_ref,
    p_sampling,
    p_settings,
    p_dx,
    p_out,
    stride_x,
    stride_dx,
    C,
    V,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_IMPORTANCE: tl.constexpr,
    SAMPLER: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """logprob, entropy, lse and dL/dlogprob [4, C], and dx over x [C, V]: one program a row."""
    i_c = tl.program_id(0).to(tl.int64)
    p_x += i_c * stride_x
    label = tl.load(p_label + i_c)
    temperature = tl.load(p_temperature + i_c)

    m, s, t = scan_row(p_x, temperature, V, LOGIT_SCALE, SOFTCAP, BLOCK_V)
    z_label = label_logit(p_x, label, temperature, V, LOGIT_SCALE, SOFTCAP)
    log_s = tl.log(s)
    lse = m + log_s
    # NaN must stay NaN: a maximum that drops it would hide a broken row.
    logprob = (z_label - m) - log_s
    logprob = tl.where(logprob > 0.0, 0.0, logprob)
    entropy = log_s - t / s
    entropy = tl.where(entropy < 0.0, 0.0, entropy)

    # What is None here was not given: the ratio is 1, or the term is switched off.
    old = None
    ref = None
    sampling = None
    policy_mask = None
    dentropy = None
    if p_old is not None:
        old = tl.load(p_old + i_c)
    if p_ref is not None:
        ref = tl.load(p_ref + i_c)
    if p_sampling is not None:
        sampling = tl.load(p_sampling + i_c)
    if p_policy_mask is not None:
        policy_mask = tl.load(p_policy_mask + i_c)
    if p_entropy_weight is not None:
        dentropy = -tl.load(p_entropy_weight + i_c)
    dlogprob = token_coefficient(
        logprob,
        tl.load(p_advantage + i_c),
        tl.load(p_weight + i_c),
        policy_mask,
        old,
        ref,
        sampling,
        p_settings,
        SURROGATE,
        KL,
        KL_IMPORTANCE,
        SAMPLER,
    )

    tl.store(p_out + i_c, logprob)
    tl.store(p_out + C + i_c, entropy)
    tl.store(p_out + 2 * C + i_c, lse)
    tl.store(p_out + 3 * C + i_c, dlogprob)
    # The first stores of dx must not meet the last loads of the scan by another thread.
    tl.debug_barrier()
    write_row(
        p_x,
        p_dx + i_c * stride_dx,
        label,
        temperature,
        lse,
        entropy,
        dlogprob,
        dentropy,
        None,
        V,
        LOGIT_SCALE,
        SOFTCAP,
        BLOCK_V,
    )


@triton.jit
def token_coefficient(
    logprob,
    advantage,
    weight,
    policy_mask,
    old,
    ref,
    sampling,
    p_settings,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_IMPORTANCE: tl.constexpr,
    SAMPLER: tl.constexpr,
):
    """dL/dlogprob of one token; None stands for what was not given.

        L = weight · (ρ · surrogate(r) + kl_coef · KL · (r, with importance correction))

    with r = exp(logprob − old) and ρ = exp(old − sampling), truncated or masked, no gradient.
    The same arithmetic as `objective.token_objective`, whose conventions hold here.
    """
    if old is None:
        ratio = tl.full([], 1.0, logprob.dtype)
        old = logprob
    else:
        ratio = saturated_exp(logprob - old)

    if SURROGATE == "clip":
        is_clipped = (advantage > 0.0) & (ratio > tl.load(p_settings + 1))
        is_clipped |= (advantage < 0.0) & (ratio < tl.load(p_settings))
        is_clipped |= (advantage < 0.0) & (ratio > tl.load(p_settings + 2))  # two-sided
        dlogprob = tl.where(is_clipped, 0.0, -ratio * advantage)
    elif SURROGATE == "detached":
        dlogprob = -tl.minimum(ratio, tl.load(p_settings + 3)) * advantage
    else:
        tl.static_assert(SURROGATE == "sapo")
        steepness = tl.where(advantage > 0.0, tl.load(p_settings + 4), tl.load(p_settings + 5))
        # The gate 4 / τ · sigmoid(u), u = τ (r − 1), has slope 4 · sigmoid(u) · sigmoid(−u), which
        # is even in u: with e = exp(−|u|) nothing overflows.
        e = tl.exp(-steepness * tl.abs(ratio - 1.0))
        dlogprob = -4.0 * e / ((1.0 + e) * (1.0 + e)) * ratio * advantage

    if SAMPLER != "":
        # NaN marks a token that the sampler did not score.
        log_importance = tl.where(sampling == sampling, old - sampling, 0.0)
        importance = saturated_exp(log_importance)
        highest = tl.load(p_settings + 8)
        if SAMPLER == "truncate":
            dlogprob *= tl.minimum(importance, highest)
        else:
            tl.static_assert(SAMPLER == "mask")
            is_kept = (importance >= tl.load(p_settings + 7)) & (importance <= highest)
            dlogprob = tl.where(is_kept, dlogprob * importance, 0.0)
    if policy_mask is not None:
        dlogprob = tl.where(policy_mask, dlogprob, 0.0)

    if KL != "":
        kl, dkl = kl_estimate(ref - logprob, KL)
        if KL_IMPORTANCE:
            dkl = ratio * (dkl + kl)
        dlogprob += tl.load(p_settings + 6) * dkl
    return tl.where(weight == 0.0, 0.0, weight * dlogprob)


@triton.jit
def kl_estimate(log_ratio, ESTIMATOR: tl.constexpr):
    """Estimate of KL(policy || reference) from log(ref / policy), and its derivative by logprob."""
    if ESTIMATOR == "k1":
        kl = -log_ratio
        dkl = 1.0
    elif ESTIMATOR == "k2":
        kl = 0.5 * log_ratio * log_ratio
        dkl = -log_ratio
    else:
        tl.static_assert(ESTIMATOR == "k3")
        b_expm1 = expm1(log_ratio)
        kl = b_expm1 - log_ratio
        dkl = -b_expm1
    return kl, dkl


@triton.jit
def saturated_exp(x):
    """exp(x) that stops at the largest finite fp32: an advantage of 0 times it is still 0."""
    y = tl.exp(x)
    return tl.where(y == float("inf"), 3.4028234663852886e38, y)


@triton.jit
def expm1(x):
    """exp(x) − 1 that keeps its digits near 0: twelve terms of the series below |x| = 1/2."""
    series = tl.full([], 1.0, x.dtype)
    for k in tl.static_range(11):
        series = 1.0 + series * x / (12 - k)
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)
