"""TRL's GRPOTrainer with its loss and its log-prob passes taken straight from hidden states.

`LinearGRPOTrainer` is a drop-in subclass for TRL 1.16: same arguments, same GRPOConfig, same loss
and gradients (tests/examples compares them for each loss type). What differs is how they come
about: logits are fp32 and never kept, the gradient is taken in forward where the loss allows it,
and tokens whose gradient is zero from the start are skipped.

Metrics are means over the scored tokens. `kl` is the estimate before TRL's bias correction. Not
logged, because they are no sums over tokens: clip_ratio/low_min, clip_ratio/high_max,
vespo/phi_seq_mean; nor policy_loss and entropy_coef.
"""

import dataclasses
import functools
import math
import string
import tempfile
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers_logprobs import HeadTerms, head_terms
from trl import GRPOConfig, GRPOTrainer

from lwz_kernels.linear_logprobs import linear_logprobs
from lwz_kernels.linear_policy_loss import PolicyLossConfig, linear_policy_loss

__all__ = ["LinearGRPOTrainer", "policy_loss_config"]

TOKEN_MEAN_LOSSES = ("dapo", "cispo", "vespo")


def policy_loss_config(args: GRPOConfig, *, has_sampler_correction: bool) -> PolicyLossConfig:
    """Say in our words what a GRPOConfig says in TRL's; only what the loss type reads."""
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    settings: dict[str, Any] = {"loss_type": args.loss_type}
    if args.loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        settings |= {"clip_ratio_low": args.epsilon, "clip_ratio_high": epsilon_high}
        settings |= {"clip_ratio_delta": args.delta}
    if args.loss_type == "cispo":
        settings |= {"cispo_ratio_max": epsilon_high}
    if args.loss_type == "dr_grpo":
        settings |= {"max_completion_tokens": args.max_completion_length}
    if args.loss_type in ("sapo", "vespo"):  # their knobs have TRL's names
        names = [f.name for f in dataclasses.fields(PolicyLossConfig)]
        settings |= {name: getattr(args, name) for name in names if name.startswith(args.loss_type)}
    if args.loss_type != "vespo":  # has a weight of its own
        settings |= {"ratio_level": args.importance_sampling_level}
    if has_sampler_correction:
        level, how = args.vllm_importance_sampling_mode.split("_")
        low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
        settings |= {"sampler_correction": how, "sampler_correction_level": level}
        settings |= {"sampler_ratio_min": low or 0.0}
        settings |= {"sampler_ratio_max": math.inf if high is None else high}
    return PolicyLossConfig(
        kl_coef=args.beta,
        kl_importance_correction=args.use_bias_correction_kl and args.beta != 0.0,
        off_policy_kl_max=args.off_policy_mask_threshold,
        **settings,
    )


def last_rows(hidden_BLD: Tensor, length: int) -> Tensor:
    """Hidden states that predict the last `length` tokens, [B * length, D]."""
    return hidden_BLD[:, -length - 1 : -1].flatten(0, 1)


def score_last_tokens(
    hidden_BLD: Tensor, terms: HeadTerms, labels_BL: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of the last L tokens, [B, L]; 0 where the label is -100."""
    logprobs_T, entropy_T, _ = linear_logprobs(
        last_rows(hidden_BLD, labels_BL.shape[1]),
        labels=labels_BL.flatten(),
        temperature=temperature,
        **terms,
    )
    return logprobs_T.view_as(labels_BL), entropy_T.view_as(labels_BL)


def add_head_argument(model: Any, *, dtype: torch.dtype | None) -> None:
    """Let `model(..., head=f)` return f(hidden [B, L, D], head terms) in place of logits.

    It happens inside `forward`, so the hooks of DDP, FSDP and DeepSpeed run as they do for logits.
    """
    plain_forward = model.forward

    @functools.wraps(type(model).forward)  # generate() looks at the signature
    def forward(self: Any, *args: Any, head: Callable | None = None, **kwargs: Any) -> Any:
        if head is None:
            return plain_forward(*args, **kwargs)
        hidden_BLD = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        terms, device = head_terms(self), hidden_BLD.device.type
        operands = terms["weight"].dtype
        if torch.is_autocast_enabled(device):
            operands = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):  # the types are chosen here, once
            terms["weight"] = terms["weight"].to(dtype or operands)
            return head(hidden_BLD.to(dtype or operands), terms)

    model.forward = MethodType(forward, model)


class LinearGRPOTrainer(GRPOTrainer):
    """GRPOTrainer without logits. Arguments as GRPOTrainer's.

    Raises:
        NotImplementedError: adaptive entropy, a router loss or images.
        TypeError: an adapter on the output head.
    """

    args: GRPOConfig
    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.use_adaptive_entropy:
            raise NotImplementedError("use_adaptive_entropy is not supported: set entropy_coef")
        if self.aux_loss_enabled:
            raise NotImplementedError("no router loss here: set router_aux_loss_coef=0")
        self._policy_loss_config()  # an impossible combination raises here, not at the first step
        for wrapped in filter(None, (self.model, self.ref_model)):
            model = self.accelerator.unwrap_model(wrapped)
            model = model.get_base_model() if hasattr(model, "get_base_model") else model
            head_terms(model)
            add_head_argument(
                model, dtype=torch.float32 if self.args.cast_lm_head_to_fp32 else None
            )

    def _policy_loss_config(self, entropy_coef: float = 0.0) -> PolicyLossConfig:
        is_corrected = self.use_vllm and self.vllm_importance_sampling_correction
        config = policy_loss_config(self.args, has_sampler_correction=is_corrected)
        return dataclasses.replace(config, entropy_coef=entropy_coef)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **extra: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Old and reference log-probs of the last L tokens, [B, L]; 0 at padding."""
        refuse_images(extra)
        labels = input_ids.masked_fill(attention_mask == 0, -100)[:, -logits_to_keep:]
        parts = []
        for ids_BL, mask_BL, labels_BL in zip(
            *(x.split(batch_size or len(x)) for x in (input_ids, attention_mask, labels)),
            strict=True,
        ):
            score = functools.partial(
                score_last_tokens, labels_BL=labels_BL, temperature=self.temperature
            )
            with self.accelerator.autocast():
                parts.append(model(input_ids=ids_BL, attention_mask=mask_BL, head=score))
        logprobs_BL, entropy_BL = (torch.cat(part) for part in zip(*parts, strict=True))
        return logprobs_BL, entropy_BL if compute_entropy else None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        refuse_images(inputs)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with self.accelerator.autocast():
            loss, metrics = model(
                input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                attention_mask=attention_mask,
                head=functools.partial(self._head_loss, inputs=inputs),
            )
        self._log_sums(metrics)
        return loss

    def _head_loss(
        self, hidden_BLD: Tensor, terms: HeadTerms, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the completion tokens, rows being [B * L]; masked ones cost nothing."""
        labels_BL = inputs["completion_ids"]
        mask_BL = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
        labels_BL = labels_BL.masked_fill(~mask_BL, -100)
        batch, length = labels_BL.shape
        advantages = inputs["advantages"]  # [B], or [B, L] from a subclass
        advantages_BL = advantages if advantages.dim() == 2 else advantages[:, None]

        policy_mask_BL = None
        if self.top_entropy_quantile < 1.0:
            with torch.no_grad():
                _, entropy_BL = score_last_tokens(hidden_BLD, terms, labels_BL, self.temperature)
            policy_mask_BL = self.get_high_entropy_mask(
                entropy_BL, mask_BL, 1 - self.top_entropy_quantile
            )
        num_loss_tokens = self._num_loss_tokens(mask_BL, inputs)
        entropy_coef = self.entropy_coef
        if entropy_coef:  # TRL takes the mean over this micro-batch, whatever the loss type
            bonus_mask_BL = mask_BL if policy_mask_BL is None else policy_mask_BL
            bonus_tokens = bonus_mask_BL.sum().clamp(min=1) * self._accumulation_steps
            entropy_coef *= float(num_loss_tokens / bonus_tokens)
        return linear_policy_loss(
            last_rows(hidden_BLD, length),
            labels=labels_BL.flatten(),
            advantages=advantages_BL.expand(batch, length).flatten().float(),
            loss_mask=mask_BL.flatten(),
            cu_seqlens=torch.arange(batch + 1, dtype=torch.int32, device=labels_BL.device) * length,
            num_loss_tokens=num_loss_tokens,
            num_sequences=batch * self._accumulation_steps,
            old_logprobs=flat(inputs.get("old_per_token_logps")),
            ref_logprobs=flat(inputs.get("ref_per_token_logps")),
            sampling_logprobs=flat(inputs.get("sampling_per_token_logps")),
            policy_mask=flat(policy_mask_BL),
            temperature=self.temperature,
            config=self._policy_loss_config(entropy_coef),
            **terms,
        )

    @property
    def _accumulation_steps(self) -> int:
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _num_loss_tokens(self, mask_BL: Tensor, inputs: dict[str, Any]) -> Tensor:
        """TRL's denominator per process: DDP then averages over processes."""
        if self.loss_type not in TOKEN_MEAN_LOSSES:  # bnpo: each micro-batch counts alike
            return mask_BL.sum().clamp(min=1) * self._accumulation_steps
        num_tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if self.model.training:  # it counts the generation batch, of which this window is a part
            num_tokens = num_tokens * self._accumulation_steps / self.args.steps_per_generation
        return num_tokens

    def _log_sums(self, metrics: dict[str, Tensor]) -> None:
        """TRL's metrics from sums over loss tokens: one reduction, one host sync."""
        names = ["num_tokens_sum", "entropy_sum", "kl_sum", "clip_low_sum", "clip_high_sum"]
        sums = torch.stack([metrics.get(n, metrics["entropy_sum"] * 0) for n in names])
        count, *totals = self.accelerator.reduce(sums, reduction="sum").tolist()
        entropy, kl, low, high = (total / max(count, 1.0) for total in totals)
        logged = {"entropy": entropy}
        if self.beta != 0.0:
            logged["kl"] = kl
        if self.loss_type == "cispo":
            logged["cispo_clip_ratio"] = high
        elif self.loss_type not in ("sapo", "vespo"):
            logged |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high}
            logged |= {"clip_ratio/region_mean": low + high}
        for name, value in logged.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)


def flat(tensor_BL: Tensor | None) -> Tensor | None:
    """[B, L] to [B * L]."""
    return None if tensor_BL is None else tensor_BL.flatten()


def refuse_images(inputs: dict[str, Any]) -> None:
    """Raise where TRL would hand images to the model."""
    if inputs.get("pixel_values") is not None:
        raise NotImplementedError("images are not supported here: use trl.GRPOTrainer")


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, so that the example downloads nothing."""
    letters = {token: i for i, token in enumerate(["<pad>", "<eos>", *string.ascii_lowercase])}
    words = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def vowel_reward(completions: list[str], **_: Any) -> list[float]:
    """Share of vowels."""
    return [sum(letter in "aeiou" for letter in text) / 16 for text in completions]


def main() -> None:
    """Two steps of GRPO with KL on a random two-layer Llama."""
    torch.manual_seed(0)
    tokenizer = letter_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with tempfile.TemporaryDirectory() as directory:
        LlamaForCausalLM(config).save_pretrained(f"{directory}/model")  # the reference policy's too
        trainer = LinearGRPOTrainer(
            model=f"{directory}/model",
            reward_funcs=vowel_reward,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": ["a b c", "x y z", "m n", "k"]}),
            args=GRPOConfig(
                output_dir=f"{directory}/run",
                max_steps=2,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                num_generations=4,
                num_iterations=1,
                max_completion_length=16,
                loss_type="dapo",
                beta=0.04,
                temperature=0.9,
                learning_rate=1e-3,
                bf16=False,
                use_cpu=not torch.cuda.is_available(),
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
        )
        trainer.train()


if __name__ == "__main__":
    main()
