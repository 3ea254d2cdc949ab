"""Heads that are not what they look like: adapters, quantised weights, sharded placeholders."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from lwz_kernels.linear_logprobs import linear_logprobs
from lwz_kernels.loss_head import head_parameters
from lwz_kernels.loss_head.checks import whole_weight
from lwz_kernels.loss_head.chunks import balanced_slices


class LoraLinear(nn.Module):
    """As peft wraps a layer: the weight is there, and is not all that the layer computes."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 6, bias=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight


def test_head_parameters_are_those_of_a_linear_layer() -> None:
    layer = nn.Linear(4, 6)
    weight, bias = head_parameters(layer)
    assert weight is layer.weight
    assert bias is layer.bias
    assert head_parameters(nn.Linear(4, 6, bias=False))[1] is None
    assert head_parameters(nn.Embedding(6, 4))[0].shape == (6, 4)


def test_head_parameters_refuse_an_adapter() -> None:
    with pytest.raises(TypeError, match="LoraLinear with an adapter"):
        head_parameters(LoraLinear())


def test_head_parameters_refuse_a_quantised_weight() -> None:
    layer = nn.Linear(4, 6)
    layer.weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="expected a linear layer with a floating-point weight"):
        head_parameters(layer)


def test_whole_weight_refuses_a_zero_3_placeholder() -> None:
    placeholder = torch.empty(0)
    placeholder.ds_id = 7
    with pytest.raises(ValueError, match="GatheredParameters"):
        whole_weight(placeholder)


def test_linear_logprobs_names_zero_3_before_it_complains_about_shapes() -> None:
    placeholder = nn.Parameter(torch.empty(0))
    placeholder.ds_id = 7
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="GatheredParameters"):
        linear_logprobs(torch.zeros(3, 4), placeholder, labels)


@pytest.mark.dist
def test_linear_logprobs_refuses_hidden_states_that_are_a_dtensor(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        hidden = distribute_tensor(torch.zeros(3, 4), mesh, [Replicate()])
        with pytest.raises(TypeError, match="hidden is a DTensor"):
            linear_logprobs(hidden, torch.zeros(6, 4), torch.zeros(3, dtype=torch.int64))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 9, 100])
def test_balanced_slices_cover_all_rows_in_equal_parts(num_rows: int) -> None:
    slices = balanced_slices(num_rows, bytes_per_row=10, chunk_bytes=85)
    lengths = [part.stop - part.start for part in slices]
    assert [row for part in slices for row in range(num_rows)[part]] == list(range(num_rows))
    assert len(slices) == -(-num_rows // 8)
    assert not lengths or max(lengths) - min(lengths) <= 1
    assert all(length <= 8 for length in lengths)


def test_balanced_slices_hold_one_row_at_least() -> None:
    assert len(balanced_slices(3, bytes_per_row=10, chunk_bytes=1)) == 3
