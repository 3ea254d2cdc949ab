"""Log-probs and entropy of a transformers causal LM, without ever forming its [B, L, V] logits.

`causal_lm_logprobs` runs the model's backbone and hands its hidden states with the head's weight
to `linear_logprobs`. What a model does to its logits after the head stands in its config;
`head_terms` maps it to `softcap` and `logit_scale`. A model whose `forward` changes its logits in
yet another way would get other numbers, so compare once with `.logits`, as main() does.
"""

from typing import TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from lwz_kernels.linear_logprobs import linear_logprobs
from lwz_kernels.logprobs_from_logits import logprobs_from_logits
from lwz_kernels.loss_head.checks import head_parameters

__all__ = ["HeadTerms", "causal_lm_logprobs", "head_terms"]


class HeadTerms(TypedDict):
    """What stands between hidden states and logits: arguments of linear_logprobs by name."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


def head_terms(model: PreTrainedModel) -> HeadTerms:
    """Weight, bias, softcap (Gemma) and scale (Cohere, Granite, Falcon-H1) of a model's head.

    Raises:
        TypeError: the head is no plain linear layer; its weight alone would be a different model.
    """
    weight, bias = head_parameters(model.get_output_embeddings())
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if scale is None:
        scale = getattr(config, "lm_head_multiplier", None)
    if scale is None and (scaling := getattr(config, "logits_scaling", None)) is not None:
        # HyperCLOVA X multiplies by what Granite divides by.
        scale = scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    return {
        "weight": weight,
        "bias": bias,
        "softcap": getattr(config, "final_logit_softcapping", None),
        "logit_scale": 1.0 if scale is None else float(scale),
    }


def causal_lm_logprobs(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of each token given the tokens before it, differentiable.

    Args:
        model: a decoder with one linear output head. Tied embeddings need nothing special: their
            weight receives two gradients.
        input_ids: [B, L] int64.
        attention_mask: [B, L], 1 for real tokens; padding may be on either side.
        temperature: divides the logits before the softmax.

    Returns:
        logprobs, entropy: [B, L - 1] fp32; column i scores token i + 1. 0 where either is padding.
    """
    backbone = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    terms = head_terms(model)
    is_scored_BL = (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
    labels_BL = input_ids[:, 1:].masked_fill(~is_scored_BL, -100)  # such rows cost nothing
    logprobs_T, entropy_T, _ = linear_logprobs(
        backbone.last_hidden_state[:, :-1].flatten(0, 1).to(terms["weight"].dtype),
        labels=labels_BL.flatten(),
        temperature=temperature,
        **terms,
    )
    return logprobs_T.view_as(labels_BL), entropy_T.view_as(labels_BL)


def main() -> None:
    """Compare with the model's own logits, and say what they would have cost."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=8192,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    input_ids_BL = torch.randint(config.vocab_size, (2, 128))
    attention_mask_BL = torch.ones_like(input_ids_BL)
    attention_mask_BL[1, :40] = 0  # padded on the left

    logprobs_BL, entropy_BL = causal_lm_logprobs(model, input_ids_BL, attention_mask_BL)
    logprobs_BL.sum().backward()

    with torch.no_grad():
        logits_BLV = model(input_ids=input_ids_BL, attention_mask=attention_mask_BL).logits
        expected_BL, _, _ = logprobs_from_logits(logits_BLV[:, :-1], input_ids_BL[:, 1:])
    is_scored_BL = logprobs_BL != 0
    difference = (logprobs_BL - expected_BL)[is_scored_BL].abs().max().item()
    print(f"tokens scored         {int(is_scored_BL.sum())}")
    print(f"mean log-prob         {logprobs_BL[is_scored_BL].mean().item():.4f}")
    print(f"mean entropy          {entropy_BL[is_scored_BL].mean().item():.4f}")
    print(f"largest difference    {difference:.1e} from the model's own logits")
    print(f"logits never formed   {logits_BLV.numel() * 4 / 1e6:.1f} MB of fp32")


if __name__ == "__main__":
    main()
