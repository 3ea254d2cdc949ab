"""Each pitfall: the text that guards against it, what an incautious author writes, and its test."""

from dataclasses import dataclass

__all__ = ["GUARDS", "Guard"]

PARALLEL = "tests/kernels/test_sequence_parallel.py::test_sequence_parallel_over_ranks"
UPDATE = "tests/trainer/test_sequence_parallel_update.py"
MESH = f"{UPDATE}::test_run_does_not_depend_on_the_mesh"
HEAD = "tests/kernels/test_loss_head_parallel.py::test_loss_head_over_ranks_is_that_of_one"
MERGE = "tests/kernels/test_sequence_parallel.py::test_merge_attention_of_nothing_and_nothing"
SHIFT = "tests/kernels/test_sequence_parallel_layout.py::test_shift_labels_before_sharding"


@dataclass(frozen=True)
class Guard:
    """A pitfall and the test that must fail when its guard is taken out."""

    pitfall: str
    module: str
    guard: str
    """Text that occurs once in the module's source."""
    without: str
    """What replaces it."""
    test: str
    """pytest node, or its beginning, whose tests must not all pass then."""


GUARDS = {
    "labels_rolled_in_a_shard": Guard(
        "labels are rolled after slicing: one wrong label a rank",
        "lwz_trainer.update.sharding",
        "labels_R=batch.labels_R[rows]",
        "labels_R=torch.cat((batch.labels_R[rows][:-1], batch.labels_R[rows][:1]))",
        MESH,
    ),
    "labels_across_documents": Guard(
        "the last token of a document is given the first of the next as its label",
        "lwz_kernels.sequence_parallel.sharding",
        ".roll(-1).index_fill(0, last, ignore_index)",
        ".roll(-1)",
        SHIFT,
    ),
    "skipped_silently": Guard(
        "a fallback skips sequence parallelism and nobody counts",
        "lwz_trainer.update.work",
        "self.attend.parallel.check_calls(expected)",
        "pass",
        f"{UPDATE}::test_run_refuses_attention_within_a_shard",
    ),
    "backward_not_sent": Guard(
        "a backward-only bug: forward is right, gradients stay where they are",
        "lwz_kernels.sequence_parallel.communication",
        "return transpose_ranks(dout, ctx.group), None",
        "return dout, None",
        PARALLEL,
    ),
    "strides_of_a_transposed_view": Guard(
        "the receive buffer keeps the strides of a transposed view",
        "lwz_kernels.sequence_parallel.communication",
        "received = x.new_empty(x.shape)\n    dist.all_to_all_single(received, x.contiguous(),",
        "received = torch.empty_like(x)\n    dist.all_to_all_single(received, x.contiguous(),",
        PARALLEL,
    ),
    "unbatched_send": Guard(
        "every rank of a ring sends before it receives",
        "lwz_kernels.sequence_parallel.communication",
        """    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, sent, group=group, group_peer=to),
            dist.P2POp(dist.irecv, received, group=group, group_peer=source),
        ]
    )
""",
        """    dist.send(sent, group=group, group_dst=to)
    dist.recv(received, group=group, group_src=source)
    works = []
""",
        PARALLEL,
    ),
    "collectives_depend_on_work": Guard(
        "a rank that sees no key at a hop leaves the exchange out",
        "lwz_kernels.sequence_parallel.ring",
        "pending = start_ring_shift(kv_2NJK, group) if hop + 1 < len(steps) else None",
        "pending = start_ring_shift(kv_2NJK, group) "
        "if hop + 1 < len(steps) and not step.is_empty else None",
        PARALLEL,
    ),
    "chunks_of_the_own_shard": Guard(
        "uneven vocabulary shards plan different numbers of chunks, with collectives inside",
        "lwz_kernels.loss_head.vocab_parallel",
        "largest=max(counts)",
        "largest=weight.shape[0]",
        HEAD,
    ),
    "kv_heads_of_the_process": Guard(
        "the number of KV heads is kept for the process, not for the call",
        "lwz_kernels.sequence_parallel.ulysses",
        "ctx.group, ctx.kv_heads = group, k.shape[1]",
        "ctx.group, ctx.kv_heads = group, globals().setdefault('KV_HEADS', k.shape[1])",
        PARALLEL,
    ),
    "merge_in_bf16": Guard(
        "log-sum-exps are merged in bf16",
        "lwz_kernels.sequence_parallel.ring",
        "weight_HN = torch.sigmoid(lse_part - lse)",
        "weight_HN = torch.sigmoid((lse_part.bfloat16() - lse.bfloat16()).to(lse.dtype))",
        PARALLEL,
    ),
    "merge_of_nothing": Guard(
        "-inf - -inf where neither part saw a key",
        "lwz_kernels.sequence_parallel.ring",
        'weight_HN = weight_HN.masked_fill(lse_part == float("-inf"), 0.0)',
        "pass",
        MERGE,
    ),
    "gradients_summed_in_bf16": Guard(
        "dK and dV are summed over ranks in bf16",
        "lwz_kernels.sequence_parallel.gather_kv",
        "grad_dtype=wide_dtype(q.dtype)",
        "grad_dtype=q.dtype",
        PARALLEL,
    ),
    "sums_of_rounded_sums": Guard(
        "the gradient of a gathered tensor is summed in bf16",
        "lwz_kernels.sequence_parallel.communication",
        "start_reduce_scatter(x.to(wide_dtype(x.dtype)), group).wait().to(x.dtype)",
        "start_reduce_scatter(x, group).wait()",
        PARALLEL,
    ),
    "gradients_of_a_group_rounded": Guard(
        "the gradients of copied KV heads are summed in bf16",
        "lwz_kernels.sequence_parallel.ulysses",
        "x_JCNK.sum(1, dtype=wide_dtype(x_SNJK.dtype))",
        "sum(x_JCNK.unbind(1))",
        "tests/kernels/test_sequence_parallel.py::test_gradients_of_a_copied_key_head",
    ),
    "gradient_through_the_collective": Guard(
        "the loss is summed over ranks before backward: every gradient times P",
        "lwz_trainer.update.policy_update",
        "        loss.backward()\n",
        "        if work.group is not None:\n"
        "            import torch.distributed.nn\n\n"
        "            loss = torch.distributed.nn.all_reduce(loss, group=work.group)\n"
        "        loss.backward()\n",
        MESH,
    ),
    "local_counts": Guard(
        "the loss is divided by the tokens of the rank",
        "lwz_trainer.update.policy_update",
        "totals = self._ranks.sum([float(sum(lengths)), float(len(lengths))])",
        "totals = [float(sum(lengths)), float(len(lengths))]",
        MESH,
    ),
    "sequence_of_the_shard": Guard(
        "the loss of a sequence is made from the part on this rank",
        "lwz_kernels.linear_policy_loss.op",
        "return functools.partial(_all_reduce, group=self.sequence_group)",
        "return lambda values: values",
        MESH,
    ),
    "positions_of_the_shard": Guard(
        "positions start anew on every rank",
        "lwz_trainer.update.sharding",
        'position_ids_T=position_ids(layout, rank, "cpu")',
        "position_ids_T=torch.arange(layout.local_tokens)",
        MESH,
    ),
    "order_of_packs": Guard(
        "ranks compute packs in different orders and wait for each other",
        "lwz_trainer.update.policy_update",
        "for pack in placed[self._teams.place]",
        "for pack in placed[self._teams.place][:: (-1) ** self._teams.place]",
        MESH,
    ),
    "gradients_averaged": Guard(
        "a framework averages the gradients of a loss that is already divided by global counts",
        "lwz_trainer.update.fully_sharded",
        "root.set_gradient_divide_factor(1.0)",
        "pass",
        "tests/trainer/test_fully_sharded.py::test_update_is_that_of_one_process",
    ),
}
