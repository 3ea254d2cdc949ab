"""The native row passes over logits: every instruction set against fp64, and what they may touch.

Errors are judged against fp64 truth, relative to what the same formulas in fp32 torch lose.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lwz_kernels import native
from lwz_kernels.loss_head import native_rows
from lwz_kernels.loss_head.matmul import HeadProducts

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
EPS = torch.finfo(FP32).eps
needs_native = pytest.mark.skipif(
    not native.is_available(), reason=f"native library: {native.unavailable_reason()}"
)
pytestmark = needs_native
LEVELS = [
    pytest.param(
        level,
        marks=pytest.mark.skipif(
            not native.is_available() or level not in native.levels(),
            reason=f"this processor or this build lacks {level}",
        ),
    )
    for level in native.LEVELS
]
# One element, around a vector of 8 lanes, around and between steps of 32 and 64 columns and blocks
# of 2,048, the vocabularies of GPT-2 and Qwen2.5, and the largest one known.
VOCAB_SIZES = [1, 7, 8, 9, 127, 1000, 2047, 2048, 2049, 4099, 50257, 151936, 262144]
# (logit_scale, softcap): plain, scaled, and capped so that logits of a few units are squashed.
TRANSFORMS = [(1.0, None), (0.3, None), (1.7, 5.0), (1.0, 30.0)]


@dataclass(frozen=True)
class Rows:
    """A chunk of logits, and the gradients of what is computed from each of its rows."""

    logits: Tensor
    labels: Tensor
    temperature: Tensor
    dlogprobs: Tensor
    dentropy: Tensor | None
    dlse: Tensor | None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __getitem__(self, index: Tensor | slice) -> "Rows":
        return replace(
            self,
            logits=self.logits[index],
            labels=self.labels[index],
            temperature=self.temperature[index],
            dlogprobs=self.dlogprobs[index],
            dentropy=None if self.dentropy is None else self.dentropy[index],
            dlse=None if self.dlse is None else self.dlse[index],
        )

    def to(self, dtype: torch.dtype) -> "Rows":
        return replace(
            self,
            logits=self.logits.to(dtype),
            temperature=self.temperature.to(dtype),
            dlogprobs=self.dlogprobs.to(dtype),
            dentropy=None if self.dentropy is None else self.dentropy.to(dtype),
            dlse=None if self.dlse is None else self.dlse.to(dtype),
        )


def _rows(num_rows: int, vocab_size: int, *, spread: float = 3.0, offset: float = 0.0) -> Rows:
    return Rows(
        logits=torch.randn(num_rows, vocab_size) * spread + offset,
        labels=torch.randint(vocab_size, (num_rows,)),
        temperature=0.5 + torch.rand(num_rows),
        dlogprobs=torch.randn(num_rows),
        dentropy=torch.randn(num_rows),
        dlse=torch.randn(num_rows),
    )


def _oracle_z(rows: Rows) -> Tensor:
    if rows.softcap is None:
        return rows.logit_scale * rows.logits / rows.temperature[:, None]
    capped = rows.softcap * torch.tanh(rows.logit_scale * rows.logits / rows.softcap)
    return capped / rows.temperature[:, None]


def _label_is_here(rows: Rows) -> Tensor:
    return (rows.labels >= 0) & (rows.labels < rows.logits.shape[1])


def _oracle_statistics(rows: Rows) -> Tensor:
    """The four sums by their definition, in the dtype of the logits."""
    z = _oracle_z(rows)
    highest = z.amax(-1, keepdim=True)
    below = torch.where(z == -math.inf, -1e4, z - highest)
    exps = below.exp()
    label = rows.labels.clamp(0, z.shape[1] - 1)[:, None]
    label_z = torch.where(_label_is_here(rows), z.gather(1, label).squeeze(1), 0.0)
    return torch.stack([highest.squeeze(1), exps.sum(-1), (exps * below).sum(-1), label_z])


def _finish(partials: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    highest, sums, weighted, label_z = partials
    log_sum = sums.log()
    entropy = (log_sum - weighted / sums).clamp(min=0.0)
    return (label_z - highest - log_sum).clamp(max=0.0), entropy, highest + log_sum


def _oracle_dlogits(rows: Rows) -> Tensor:
    """The gradient of Σ dlogprob · logprob + dentropy · entropy + dlse · lse, by autograd."""
    logits = rows.logits.detach().requires_grad_()
    z = _oracle_z(replace(rows, logits=logits))
    log_p = torch.log_softmax(z, -1)
    finite_log_p = log_p.masked_fill(log_p == -math.inf, 0.0)
    label = rows.labels.clamp(0, z.shape[1] - 1)[:, None]
    is_here = _label_is_here(rows)
    picked = torch.where(is_here, z.gather(1, label).squeeze(1), 0.0)
    lse = torch.logsumexp(z, -1)
    loss = (rows.dlogprobs * (picked - lse)).sum()
    if rows.dentropy is not None:
        loss = loss - (rows.dentropy[:, None] * log_p.exp() * finite_log_p).sum()
    if rows.dlse is not None:
        loss = loss + (rows.dlse * lse).sum()
    return torch.autograd.grad(loss, logits)[0]


def _eager_dlogits(rows: Rows) -> Tensor:
    """The formula as the passes have it, p = exp(z - lse) with an lse that is already rounded."""
    _, entropy, lse = _finish(_oracle_statistics(rows))
    z = _oracle_z(rows)
    log_p = z - lse[:, None]
    factor = -rows.dlogprobs[:, None]
    if rows.dentropy is not None:
        factor = factor - rows.dentropy[:, None] * (log_p.clamp(min=-1e4) + entropy[:, None])
    if rows.dlse is not None:
        factor = factor + rows.dlse[:, None]
    label = rows.labels.clamp(0, z.shape[1] - 1)[:, None]
    onehot = (rows.dlogprobs * _label_is_here(rows))[:, None]
    dz = (log_p.exp() * factor).scatter_add(1, label, onehot)
    dx = dz * (rows.logit_scale / rows.temperature)[:, None]
    if rows.softcap is None:
        return dx
    return dx * (1 - torch.tanh(rows.logit_scale * rows.logits / rows.softcap).square())


def _statistics(rows: Rows, level: str) -> Tensor:
    return native.row_statistics(
        rows.logits,
        rows.labels,
        rows.temperature,
        logit_scale=rows.logit_scale,
        softcap=rows.softcap,
        level=level,
    )


def _dlogits(rows: Rows, level: str, out_dtype: torch.dtype = FP32) -> Tensor:
    """Both passes, on a copy of the logits."""
    _, entropy, lse = _finish(_statistics(rows, level))
    return native.write_dlogits_(
        rows.logits.clone(),
        rows.labels,
        rows.temperature,
        lse,
        entropy,
        rows.dlogprobs,
        rows.dentropy,
        rows.dlse,
        logit_scale=rows.logit_scale,
        softcap=rows.softcap,
        out_dtype=out_dtype,
        level=level,
    )


def _assert_accurate(actual: Tensor, eager: Tensor, truth: Tensor, floor: float) -> None:
    assert actual.shape == truth.shape
    assert actual.isfinite().all()
    error = (actual.double() - truth).abs().max().item()
    assert error <= 2 * (eager.double() - truth).abs().max().item() + floor


def _assert_passes_are_accurate(rows: Rows, level: str) -> None:
    """At most twice the error of fp32 torch, plus a floor of a few roundings.

    The floor stands for what torch loses in rows other than these few: two roundings of the
    largest |z| for whatever is computed from it, four of the coefficients for the gradient.
    """
    wide = rows.to(FP64)
    truth, eager = _oracle_statistics(wide), _oracle_statistics(rows)
    actual = _statistics(rows, level)
    assert actual.dtype == FP32
    largest = max(truth[0].abs().max().item(), truth[3].abs().max().item())
    floor = EPS * (largest + math.log(rows.logits.shape[1]))
    for results in zip(_finish(actual), _finish(eager), _finish(truth), strict=True):
        _assert_accurate(*results, floor)
    for row in (0, 3):
        _assert_accurate(actual[row], eager[row], truth[row], EPS * largest)
    coefficients = rows.dlogprobs.abs() + (0 if rows.dlse is None else rows.dlse.abs())
    scale = (coefficients * rows.logit_scale / rows.temperature).max().item()
    _assert_accurate(
        _dlogits(rows, level), _eager_dlogits(rows), _oracle_dlogits(wide), 4 * EPS * scale
    )


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_passes_are_as_accurate_as_torch(
    level: str, transform: tuple[float, float | None], vocab_size: int
) -> None:
    logit_scale, softcap = transform
    rows = replace(_rows(3, vocab_size), logit_scale=logit_scale, softcap=softcap)
    _assert_passes_are_accurate(rows, level)


@pytest.mark.parametrize("spread", [0.01, 30.0])
@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("level", LEVELS)
def test_passes_are_as_accurate_as_torch_when_flat_or_peaked(
    level: str, softcap: float | None, spread: float
) -> None:
    """Small arguments of tanh need its relative accuracy; peaked rows underflow in most columns."""
    _assert_passes_are_accurate(replace(_rows(5, 3001, spread=spread), softcap=softcap), level)


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("level", LEVELS)
def test_passes_survive_a_large_common_offset(level: str, offset: float) -> None:
    _assert_passes_are_accurate(_rows(4, 5003, offset=offset), level)


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("is_rising", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_statistics_follow_a_maximum_that_moves_between_blocks(
    level: str, is_rising: bool, softcap: float | None
) -> None:
    rows = replace(_rows(3, 9001), softcap=softcap)
    slope = torch.linspace(-200, 200, 9001)
    logits = rows.logits + (slope if is_rising else -slope)
    _assert_passes_are_accurate(replace(rows, logits=logits), level)


@pytest.mark.parametrize("has_dlse", [False, True])
@pytest.mark.parametrize("has_dentropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("level", LEVELS)
def test_dlogits_without_an_upstream_gradient_equal_those_with_zeros(
    level: str, softcap: float | None, has_dentropy: bool, has_dlse: bool
) -> None:
    rows = replace(_rows(4, 777), softcap=softcap)
    zeros = torch.zeros(4)
    given = replace(
        rows,
        dentropy=rows.dentropy if has_dentropy else zeros,
        dlse=rows.dlse if has_dlse else zeros,
    )
    absent = replace(
        rows,
        dentropy=rows.dentropy if has_dentropy else None,
        dlse=rows.dlse if has_dlse else None,
    )
    _assert_passes_are_accurate(absent, level)
    torch.testing.assert_close(_dlogits(absent, level), _dlogits(given, level), rtol=0, atol=1e-7)


@pytest.mark.parametrize("level", LEVELS)
def test_labels_of_another_shard_have_no_logit_and_no_onehot(level: str) -> None:
    rows = replace(_rows(6, 100), labels=torch.tensor([-1, 100, 2**40, -(2**40), 0, 99]))
    assert _statistics(rows, level)[3, :4].tolist() == [0.0] * 4
    _assert_passes_are_accurate(rows, level)


@pytest.mark.parametrize("label_is_masked", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_masked_vocabulary_entries_have_no_mass(level: str, label_is_masked: bool) -> None:
    rows = _rows(5, 5001)
    # Whole blocks of 2,048 at the start, then entries here and there.
    is_masked = torch.rand(5, 5001) < 0.3
    is_masked[:3, :4096] = True
    is_masked[torch.arange(5), rows.labels] = False
    is_masked[:, 4800] = False
    rows = replace(rows, logits=rows.logits.masked_fill(is_masked, -math.inf))
    if label_is_masked:
        rows = replace(rows, labels=is_masked.int().argmax(1))
        logprobs, entropy, lse = _finish(_statistics(rows, level))
        assert (logprobs == -math.inf).all()
        dlogits = _dlogits(rows, level)
        onehot = torch.zeros_like(dlogits).scatter_(1, rows.labels[:, None], 1.0)
        expected = onehot * (rows.dlogprobs / rows.temperature)[:, None]
        assert torch.allclose(dlogits[is_masked], expected[is_masked], rtol=1e-6, atol=0)
        assert dlogits.isfinite().all()
        assert entropy.isfinite().all()
        assert lse.isfinite().all()
    else:
        _assert_passes_are_accurate(rows, level)
        assert (_dlogits(rows, level)[is_masked] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
def test_statistics_of_a_fully_masked_row_are_empty(level: str) -> None:
    """So that such a shard of the vocabulary adds nothing to the others."""
    rows = _rows(2, 3000)
    rows.logits[0] = -math.inf
    partials = _statistics(rows, level)
    assert partials[:3, 0].tolist() == [-math.inf, 0.0, 0.0]
    assert partials[:, 1].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 2100, 2999])
@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("level", LEVELS)
def test_a_non_finite_logit_shows_in_its_row_alone(
    level: str, softcap: float | None, column: int, value: float
) -> None:
    rows = replace(_rows(3, 3000), softcap=softcap)
    rows.logits[1, column] = value
    if value == math.inf and softcap is not None:
        _assert_passes_are_accurate(rows, level)  # tanh(inf) is 1, and its slope 0
        return
    partials, dlogits = _statistics(rows, level), _dlogits(rows, level)
    assert partials[1, 1].isnan()
    assert dlogits[1].isnan().all()
    assert partials[:, [0, 2]].isfinite().all()
    assert dlogits[[0, 2]].isfinite().all()


@pytest.mark.parametrize("out_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 31, 2049])
@pytest.mark.parametrize("level", LEVELS)
def test_passes_touch_nothing_outside_the_rows(
    level: str, vocab_size: int, out_dtype: torch.dtype
) -> None:
    """NaN around the chunk: read, it would show; overwritten, it would be gone."""
    rows = _rows(3, vocab_size)
    storage = torch.full((5 * vocab_size,), math.nan)
    inside = slice(vocab_size, 4 * vocab_size)
    storage[inside] = rows.logits.flatten()
    inner = replace(rows, logits=storage[inside].view(3, vocab_size))
    partials = _statistics(inner, level)
    assert torch.equal(partials, _statistics(rows, level))
    _, entropy, lse = _finish(partials)
    expected = _dlogits(rows, level, out_dtype)
    native.write_dlogits_(
        inner.logits,
        inner.labels,
        inner.temperature,
        lse,
        entropy,
        inner.dlogprobs,
        inner.dentropy,
        inner.dlse,
        logit_scale=1.0,
        softcap=None,
        out_dtype=out_dtype,
        level=level,
    )
    assert torch.equal(inner.logits.view(out_dtype)[:, :vocab_size], expected)
    assert storage[:vocab_size].isnan().all()
    assert storage[4 * vocab_size :].isnan().all()


@pytest.mark.parametrize("vocab_size", [1, 7, 8, 100, 4099])
@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("level", LEVELS)
def test_dlogits_in_bf16_are_the_rounded_ones_in_the_same_rows(
    level: str, softcap: float | None, vocab_size: int
) -> None:
    rows = replace(_rows(4, vocab_size), softcap=softcap)
    logits = rows.logits.clone()
    _, entropy, lse = _finish(_statistics(rows, level))
    out = native.write_dlogits_(
        logits,
        rows.labels,
        rows.temperature,
        lse,
        entropy,
        rows.dlogprobs,
        rows.dentropy,
        rows.dlse,
        logit_scale=1.0,
        softcap=softcap,
        out_dtype=BF16,
        level=level,
    )
    assert out.dtype == BF16
    assert out.shape == (4, vocab_size)
    assert out.stride() == (2 * vocab_size, 1)
    assert out.data_ptr() == logits.data_ptr()
    assert torch.equal(out, _dlogits(rows, level, FP32).to(BF16))
    # The other half of each row's bytes is left as it was.
    rest = logits.view(BF16)[:, vocab_size:]
    assert torch.equal(rest.view(torch.int16), rows.logits.view(torch.int16)[:, vocab_size:])


@pytest.mark.parametrize("level", LEVELS)
def test_dlogits_round_halfway_cases_to_even(level: str) -> None:
    """At p = 1 a row's only entry is dlse / temperature: any fp32 number can be asked for."""
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, math.nan, math.inf, 3.4e38, 1e-40])
    rows = Rows(
        logits=torch.zeros(7, 1),
        labels=torch.full((7,), -1),
        temperature=torch.ones(7),
        dlogprobs=torch.zeros(7),
        dentropy=None,
        dlse=values,
    )
    out = _dlogits(rows, level, BF16)
    torch.testing.assert_close(out[:, 0], values.to(BF16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("out_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("softcap", [None, 25.0])
@pytest.mark.parametrize("level", LEVELS)
def test_a_rows_bits_depend_on_that_row_alone(
    level: str, softcap: float | None, out_dtype: torch.dtype
) -> None:
    """An odd vocabulary puts every row at another alignment."""
    rows = replace(_rows(9, 4099), softcap=softcap)
    partials, dlogits = _statistics(rows, level), _dlogits(rows, level, out_dtype)
    order = torch.randperm(9)
    assert torch.equal(_statistics(rows[order], level), partials[:, order])
    assert torch.equal(_dlogits(rows[order], level, out_dtype), dlogits[order])
    for i in range(9):
        assert torch.equal(_statistics(rows[i : i + 1], level), partials[:, i : i + 1])
        assert torch.equal(_dlogits(rows[i : i + 1], level, out_dtype), dlogits[i : i + 1])


@pytest.mark.parametrize("out_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_bits_do_not_depend_on_the_number_of_threads(level: str, out_dtype: torch.dtype) -> None:
    rows = _rows(7, 5000)
    torch.set_num_threads(1)
    partials, dlogits = _statistics(rows, level), _dlogits(rows, level, out_dtype)
    for num_threads in (2, 3):
        torch.set_num_threads(num_threads)
        assert torch.equal(_statistics(rows, level), partials)
        assert torch.equal(_dlogits(rows, level, out_dtype), dlogits)


@pytest.mark.parametrize("num_rows", [0, 1])
@pytest.mark.parametrize("out_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_passes_take_zero_rows_and_one(level: str, out_dtype: torch.dtype, num_rows: int) -> None:
    rows = _rows(num_rows, 53)
    assert _statistics(rows, level).shape == (4, num_rows)
    assert _dlogits(rows, level, out_dtype).shape == (num_rows, 53)


@pytest.mark.parametrize("level", LEVELS)
def test_statistics_of_a_single_entry_are_exact(level: str) -> None:
    rows = replace(_rows(3, 1), temperature=torch.full((3,), 2.0))
    z = rows.logits[:, 0] / 2
    expected = torch.stack([z, torch.ones(3), torch.zeros(3), z])
    assert torch.equal(_statistics(rows, level), expected)


@pytest.mark.parametrize("level", LEVELS)
def test_softcap_keeps_the_relative_accuracy_of_tanh_and_of_its_slope(level: str) -> None:
    """Rows of one entry: z is tanh itself, and with dlse = 1 the gradient is its slope."""
    size = torch.logspace(-30, math.log10(43.0), 4001)
    x = torch.cat([size, -size])
    vector = torch.zeros(x.numel())
    rows = Rows(
        logits=x[:, None],
        labels=torch.zeros(x.numel(), dtype=torch.int64),
        temperature=vector + 1,
        dlogprobs=vector,
        dentropy=None,
        dlse=vector + 1,
        softcap=1.0,
    )
    truth = x.double().tanh()
    assert ((_statistics(rows, level)[3] - truth) / truth).abs().max() < 4e-7
    slope = x.double().cosh() ** -2
    assert ((_dlogits(rows, level)[:, 0] - slope) / slope).abs().max() < 4e-7


@pytest.mark.slow
def test_statistics_address_more_than_2_to_the_31_logits() -> None:
    """Untouched pages read as zero and take no memory; the last row lies past 2^31 elements."""
    vocab_size = 2**20
    logits = torch.empty(2**11 + 2, vocab_size)
    logits[-1].normal_()
    labels = torch.full((logits.shape[0],), 5)
    temperature = torch.full((logits.shape[0],), 0.7)
    partials = native.row_statistics(logits, labels, temperature, logit_scale=1.0, softcap=None)
    last = native.row_statistics(
        logits[-1:], labels[-1:], temperature[-1:], logit_scale=1.0, softcap=None
    )
    assert torch.equal(partials[:, -1:], last)
    assert partials[0, -1] > 4.0
    assert partials[:3, 0].tolist() == [0.0, vocab_size, 0.0]


def test_native_rows_pass_on_what_they_are_given() -> None:
    """Every argument reaches the library, row vectors of any stride included."""
    rows = replace(_rows(4, 300), logit_scale=1.3, softcap=9.0)
    temperature = torch.tensor(0.8).expand(4)
    partials = native_rows.row_statistics(
        rows.logits, rows.labels, temperature, logit_scale=1.3, softcap=9.0
    )
    spread_out = replace(rows, temperature=torch.full((4,), 0.8), dlse=torch.full((4,), 0.6))
    assert torch.equal(partials, _statistics(spread_out, native.best_level()))
    _, entropy, lse = _finish(partials)
    out = native_rows.write_dlogits_(
        rows.logits.clone(),
        rows.labels,
        temperature,
        lse,
        entropy,
        rows.dlogprobs,
        rows.dentropy,
        torch.tensor(0.6).expand(4),
        logit_scale=1.3,
        softcap=9.0,
        out_dtype=BF16,
    )
    assert torch.equal(out, _dlogits(spread_out, native.best_level(), BF16))


def test_native_rows_refuse_what_the_library_cannot_take() -> None:
    rows = _rows(3, 20)

    def statistics(logits: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
        return native_rows.row_statistics(
            logits, labels, temperature, logit_scale=1.0, softcap=None
        )

    with pytest.raises(TypeError, match=r"expected fp32 tensors and int64 labels, got torch.bflo"):
        statistics(rows.logits.to(BF16), rows.labels, rows.temperature)
    with pytest.raises(TypeError, match=r"got torch.float32, torch.float64 and torch.int64"):
        statistics(rows.logits, rows.labels, rows.temperature.double())
    with pytest.raises(TypeError, match=r"and torch.int32"):
        statistics(rows.logits, rows.labels.int(), rows.temperature)
    with pytest.raises(ValueError, match=r"contiguous logits \[C, V\], got \[20, 3\] with strides"):
        statistics(rows.logits.t(), rows.labels, rows.temperature)
    with pytest.raises(ValueError, match=r"contiguous logits \[C, V\], got \[60\]"):
        statistics(rows.logits.flatten(), rows.labels, rows.temperature)
    with pytest.raises(ValueError, match="expected all tensors on cpu, got meta, cpu, cpu"):
        statistics(rows.logits.to("meta"), rows.labels, rows.temperature)
    with pytest.raises(ValueError, match=r"expected \[3\] for each row, got \[2\], \[3\]"):
        statistics(rows.logits, rows.labels[:2], rows.temperature)
    with pytest.raises(ValueError, match="a vocabulary of at least one entry"):
        statistics(rows.logits[:, :0].contiguous(), rows.labels, rows.temperature)


@pytest.mark.parametrize("out_dtype", [torch.float16, FP64], ids=str)
def test_native_rows_refuse_other_gradient_dtypes(out_dtype: torch.dtype) -> None:
    rows = _rows(2, 9)
    vector = torch.zeros(2)
    with pytest.raises(NotImplementedError, match=f"writes fp32 or bf16, got {out_dtype}"):
        native_rows.write_dlogits_(
            rows.logits,
            rows.labels,
            rows.temperature,
            vector,
            vector,
            rows.dlogprobs,
            None,
            None,
            logit_scale=1.0,
            softcap=None,
            out_dtype=out_dtype,
        )


@pytest.mark.parametrize("bad", ["lse", "entropy", "dlogprobs", "dentropy", "dlse"])
def test_native_rows_check_every_gradient_vector(bad: str) -> None:
    rows = _rows(2, 9)
    vectors = {name: torch.zeros(2) for name in ("lse", "entropy", "dlogprobs", "dentropy", "dlse")}
    vectors[bad] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"expected \[2\] for each row"):
        native_rows.write_dlogits_(
            rows.logits,
            rows.labels,
            rows.temperature,
            *vectors.values(),
            logit_scale=1.0,
            softcap=None,
            out_dtype=FP32,
        )


def test_native_refuses_an_instruction_set_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "LEVELS", (*native.LEVELS, "future"))
    rows = _rows(2, 9)
    with pytest.raises(ValueError, match="lacks the requested instruction set"):
        _statistics(rows, "future")
    before = rows.logits.clone()
    vector = torch.zeros(2)
    with pytest.raises(ValueError, match="lacks the requested instruction set"):
        native.write_dlogits_(
            rows.logits,
            rows.labels,
            rows.temperature,
            vector,
            vector,
            vector,
            None,
            None,
            logit_scale=1.0,
            softcap=None,
            out_dtype=FP32,
            level="future",
        )
    assert torch.equal(rows.logits, before)


@pytest.mark.parametrize("has_bias", [False, True])
def test_logits_of_bf16_are_exact_products_whatever_the_chunk(*, has_bias: bool) -> None:
    """Not rounded to bf16; more rows than the native product takes at a time, where it runs."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64).bfloat16(), torch.randn(90, 64).bfloat16()
    bias = torch.randn(90).bfloat16() if has_bias else None
    logits = HeadProducts(weight, bias).logits(hidden)
    truth = hidden.double() @ weight.double().T
    if bias is not None:
        truth += bias.double()
    torch.testing.assert_close(logits.double(), truth, rtol=1e-5, atol=1e-5)
    assert logits.dtype == FP32


@pytest.mark.skipif(not native.has_fastest_bf16(), reason="needs AVX512-BF16 without AMX")
def test_logits_of_a_row_do_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64).bfloat16(), torch.randn(90, 64).bfloat16()
    products = HeadProducts(weight, None)
    logits = products.logits(hidden)
    for row in (0, 127, 128, 299):
        assert torch.equal(products.logits(hidden[row : row + 1])[0], logits[row])
