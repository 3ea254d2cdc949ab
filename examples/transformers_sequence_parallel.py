"""One long pack through a transformers model on two processes, each with half of the tokens.

`register_attention` gives transformers the implementation "lwz"; the argument `sequence_parallel=`
of the model's forward reaches every layer, and attention runs over the shards of both. Everything
else of the model works on its own tokens and needs no change. main() compares loss and gradients
with the whole pack in one process, and counts that every layer took part.
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from lwz_kernels.integrations.huggingface import register_attention
from lwz_kernels.sequence_parallel import (
    SequenceParallel,
    make_layout,
    make_sequence_groups,
    position_ids,
    shard_tokens,
    shift_labels,
)

__all__ = ["Comparison", "compare", "sharded_loss"]

NUM_RANKS = 2
DOCUMENT_LENGTHS = (300, 1, 83)


@dataclass(frozen=True)
class Comparison:
    """The sharded step beside the one of a single process."""

    loss: float
    loss_alone: float
    largest_gradient_difference: float
    largest_gradient: float
    attention_calls: int


def sharded_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    labels: Tensor,
    parallel: SequenceParallel,
    num_loss_tokens: int,
) -> Tensor:
    """This rank's part of the mean loss of a pack; the parts and their gradients add up.

    Args:
        model: loaded with attn_implementation="lwz".
        input_ids: [T], the whole pack.
        labels: [T], shifted on the whole pack; -100 for none.
        parallel: of this micro-batch.
        num_loss_tokens: labels of the whole pack that count.
    """
    layout, rank = parallel.layout, parallel.rank
    own_ids = shard_tokens(input_ids, layout, rank, pad_value=0)
    own_labels = shard_tokens(labels, layout, rank, pad_value=-100)
    logits_1NV = model(
        input_ids=own_ids[None],
        position_ids=position_ids(layout, rank, input_ids.device)[None],
        use_cache=False,
        sequence_parallel=parallel,
    ).logits
    return F.cross_entropy(logits_1NV[0].float(), own_labels, reduction="sum") / num_loss_tokens


def compare() -> Comparison:
    """One step on `NUM_RANKS` processes and in this one."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank_main, (folder,), NUM_RANKS)
        sharded = torch.load(Path(folder) / "gradients.pt")
        results = json.loads((Path(folder) / "results.json").read_text())
    model, input_ids, labels = _problem()
    positions = torch.cat([torch.arange(length) for length in DOCUMENT_LENGTHS])
    logits_1TV = model(
        input_ids=input_ids[None], position_ids=positions[None], use_cache=False
    ).logits
    loss = F.cross_entropy(logits_1TV[0].float(), labels)
    loss.backward()
    alone = [parameter.grad for parameter in model.parameters()]
    differences = [(a - b).abs().max().item() for a, b in zip(sharded, alone, strict=True)]
    return Comparison(
        loss=results["loss"],
        loss_alone=loss.item(),
        largest_gradient_difference=max(differences),
        largest_gradient=max(gradient.abs().max().item() for gradient in alone),
        attention_calls=results["attention_calls"],
    )


def _problem() -> tuple[PreTrainedModel, Tensor, Tensor]:
    """The same model and pack in every process."""
    torch.manual_seed(0)
    register_attention()
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="lwz",
    )
    input_ids = torch.randint(config.vocab_size, (sum(DOCUMENT_LENGTHS),))
    return Qwen2ForCausalLM(config), input_ids, shift_labels(input_ids, DOCUMENT_LENGTHS)


def _rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=60),
    )
    model, input_ids, labels = _problem()
    groups = make_sequence_groups(NUM_RANKS)
    layout = make_layout(DOCUMENT_LENGTHS, num_ranks=NUM_RANKS)
    parallel = SequenceParallel(layout, input_ids.device, ulysses_group=groups[NUM_RANKS])
    loss = sharded_loss(model, input_ids, labels, parallel, int((labels != -100).sum()))
    attention_calls = parallel.calls
    # A layer that attends within its shard only would train on, and be wrong.
    num_layers = model.config.num_hidden_layers
    parallel.check_calls(num_layers)
    register_attention().check_calls(num_layers)
    loss.backward()
    total = loss.detach()
    dist.all_reduce(total)
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    if rank == 0:
        gradients = [parameter.grad for parameter in model.parameters()]
        torch.save(gradients, Path(folder) / "gradients.pt")
        results = {"loss": total.item(), "attention_calls": attention_calls}
        (Path(folder) / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def main() -> None:
    """Print what the two have in common."""
    for name, value in asdict(compare()).items():
        print(f"{name.replace('_', ' '):<28} {value:.8g}")


if __name__ == "__main__":
    main()
