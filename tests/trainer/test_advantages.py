import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lwz_trainer.config.rewards import ConstraintConfig
from lwz_trainer.errors import TrainingStopped, UserError
from lwz_trainer.rewards.advantages import (
    GroupAdvantages,
    check_failures,
    constrain_advantages,
    group_advantages,
)

NAN = float("nan")

# Steps of 1/64 in [-4, 4]: two rewards are equal or far enough apart that rounding cannot decide.
rewards_PG = arrays(np.float64, (3, 5), elements=st.integers(-256, 256).map(lambda step: step / 64))
normalizations = st.sampled_from(["zscore", "minmax"])


def advantages_of(rewards: list[float], normalization: str = "zscore") -> list[float]:
    result = group_advantages({"length": np.array([rewards])}, {"length": 1.0}, normalization)  # type: ignore[arg-type]
    return result.advantages_PG[0].tolist()


def test_group_advantages_zscore_by_hand() -> None:
    # mean 2.5, population variance 5 / 4
    expected = np.array([-1.5, -0.5, 0.5, 1.5]) / np.sqrt(1.25)
    assert advantages_of([1, 2, 3, 4]) == pytest.approx(expected.tolist())


def test_group_advantages_minmax_by_hand() -> None:
    assert advantages_of([1, 2, 4, 5], "minmax") == pytest.approx([-1, -0.5, 0.5, 1])


@pytest.mark.parametrize("normalization", ["zscore", "minmax"])
def test_group_advantages_of_two_are_plus_and_minus_one(normalization: str) -> None:
    assert advantages_of([0.3, 0.1], normalization) == pytest.approx([1, -1])


def test_group_advantages_average_advantages_by_weight() -> None:
    result = group_advantages(
        {"length": np.array([[0.0, 1.0]]), "format": np.array([[500.0, 100.0]])},
        {"length": 1.0, "format": 3.0},
        "zscore",
    )
    assert result.normalized["length"].tolist() == [[-1, 1]]
    assert result.normalized["format"].tolist() == [[1, -1]]
    assert result.weighted["length"] == pytest.approx(np.array([[-0.25, 0.25]]))
    assert result.weighted["format"] == pytest.approx(np.array([[0.75, -0.75]]))
    assert result.advantages_PG == pytest.approx(np.array([[0.5, -0.5]]))


def test_group_advantages_leave_missing_scores_out() -> None:
    result = group_advantages(
        {
            "writing": np.array([[1.0, NAN, 3.0], [np.inf, NAN, 2.0]]),
            "length": np.array([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]),
        },
        {"writing": 1.0, "length": 1.0},
        "zscore",
    )
    assert result.normalized["writing"].tolist() == [[-1, 0, 1], [0, 0, 0]]
    assert np.isfinite(result.advantages_PG).all()
    # A missing writing score leaves half the weight to the length, not all of it.
    assert result.advantages_PG[0, 1] == pytest.approx(0.5 * (1 / 3) / np.sqrt(2 / 9))
    assert result.num_failed == {"writing": 3, "length": 0}
    assert result.num_applicable == {"writing": 6, "length": 6}
    assert result.num_compared == {"writing": 1, "length": 2}
    assert result.num_zero_spread == {"writing": 0, "length": 1}


def test_group_advantages_unasked_reward_is_no_failure() -> None:
    rewards = {"length": np.array([[NAN, NAN], [0.2, 0.4]]), "format": np.array([[0.0, 1], [1, 0]])}
    weights = {"length": 1.0, "format": 1.0}
    is_applicable = {"length": np.array([[False, False], [True, True]])}
    result = group_advantages(rewards, weights, "zscore", is_applicable=is_applicable)
    assert result.num_failed == {"length": 0, "format": 0}
    assert result.num_applicable == {"length": 2, "format": 4}
    assert result.num_zero_spread == {"length": 0, "format": 0}
    assert result.advantages_PG == pytest.approx(np.array([[-0.5, 0.5], [0, 0]]))
    assert group_advantages(rewards, weights, "zscore").num_failed["length"] == 2


def test_group_advantages_leave_out_a_score_that_does_not_apply() -> None:
    result = group_advantages(
        {"length": np.array([[1.0, 2.0, 100.0]])},
        {"length": 1.0},
        "zscore",
        is_applicable={"length": np.array([[True, True, False]])},
    )
    assert result.advantages_PG.tolist() == [[-1, 1, 0]]
    assert result.num_applicable == {"length": 2}


@pytest.mark.parametrize("normalization", ["zscore", "minmax"])
@pytest.mark.parametrize(
    "group", [[0.7, 0.7, 0.7], [1e-8, 0, 0], [31.40001, 31.4, 31.40002], [NAN, 2, NAN], [NAN] * 3]
)
def test_group_advantages_without_spread_are_0(group: list[float], normalization: str) -> None:
    assert advantages_of(group, normalization) == [0, 0, 0]


@pytest.mark.parametrize("group", [[1, 1, 1 - 1 / 12000], [30, 30.001, 30]])
def test_group_advantages_keep_the_smallest_real_spread(group: list[float]) -> None:
    # One word too few of 12,000, and a reward model's score that differs in its fifth digit.
    assert min(advantages_of(group)) == pytest.approx(
        -np.sqrt(2) if group[0] > group[2] else -np.sqrt(0.5)
    )


@given(rewards_PG, normalizations, st.floats(-100, 100), st.sampled_from([0.125, 1.0, 8.0]))
def test_group_advantages_ignore_shift_and_scale(
    values_PG: np.ndarray, normalization: str, shift: float, scale: float
) -> None:
    first, second = (
        group_advantages({"r": rewards}, {"r": 1.0}, normalization).advantages_PG  # type: ignore[arg-type]
        for rewards in (values_PG, values_PG * scale + shift)
    )
    assert second == pytest.approx(first, abs=1e-7)


@given(rewards_PG, normalizations, st.permutations(range(5)), st.permutations(range(3)))
def test_group_advantages_follow_a_permutation(
    values_PG: np.ndarray, normalization: str, members: list[int], groups: list[int]
) -> None:
    first, second = (
        group_advantages({"r": rewards}, {"r": 1.0}, normalization).advantages_PG  # type: ignore[arg-type]
        for rewards in (values_PG, values_PG[groups][:, members])
    )
    assert second == pytest.approx(first[groups][:, members], abs=1e-9)


@given(rewards_PG)
def test_group_advantages_zscore_has_mean_0_and_deviation_1(values_PG: np.ndarray) -> None:
    result = group_advantages({"r": values_PG}, {"r": 2.0}, "zscore")
    spread_P = np.ptp(values_PG, axis=1) > 0
    assert result.advantages_PG.mean(axis=1) == pytest.approx(np.zeros(3), abs=1e-9)
    assert result.advantages_PG.std(axis=1) == pytest.approx(spread_P.astype(float), abs=1e-9)
    assert result.num_zero_spread["r"] == (~spread_P).sum()


@given(rewards_PG)
def test_group_advantages_minmax_reaches_both_ends(values_PG: np.ndarray) -> None:
    result = group_advantages({"r": values_PG}, {"r": 2.0}, "minmax")
    for values, advantages in zip(values_PG, result.advantages_PG, strict=True):
        ends = (-1, 1) if np.ptp(values) > 0 else (0, 0)
        assert (advantages.min(), advantages.max()) == pytest.approx(ends)


@settings(max_examples=50)
@given(
    st.tuples(rewards_PG, rewards_PG, rewards_PG),
    st.tuples(*[st.floats(0.01, 10)] * 3),
    normalizations,
    st.floats(0.1, 10),
)
def test_group_advantages_add_up_and_depend_on_relative_weights(
    values: tuple[np.ndarray, ...],
    weights: tuple[float, ...],
    normalization: str,
    scale: float,
) -> None:
    rewards = dict(zip("abc", values, strict=True))

    def advantages(factor: float) -> GroupAdvantages:
        scaled = {name: weight * factor for name, weight in zip("abc", weights, strict=True)}
        return group_advantages(rewards, scaled, normalization)  # type: ignore[arg-type]

    result = advantages(1.0)
    assert sum(result.weighted.values()) == pytest.approx(result.advantages_PG, abs=1e-12)
    assert advantages(scale).advantages_PG == pytest.approx(result.advantages_PG, abs=1e-9)


def test_group_advantages_do_not_change_their_input() -> None:
    values_PG = np.array([[1.0, NAN, 2.0]])
    group_advantages({"r": values_PG}, {"r": 1.0}, "zscore")
    np.testing.assert_array_equal(values_PG, [[1.0, NAN, 2.0]])


def test_group_advantages_refuse_what_does_not_fit() -> None:
    one = np.zeros((1, 2))
    with pytest.raises(ValueError, match="same rewards"):
        group_advantages({"a": one}, {"b": 1.0}, "zscore")
    with pytest.raises(ValueError, match="same rewards"):
        group_advantages({}, {}, "zscore")
    with pytest.raises(ValueError, match=r"one shape, got a \[1, 2\], b \[2, 1\]"):
        group_advantages({"a": one, "b": one.T}, {"a": 1.0, "b": 1.0}, "zscore")
    with pytest.raises(ValueError, match="one shape"):
        group_advantages({"a": one[0]}, {"a": 1.0}, "zscore")
    with pytest.raises(ValueError, match="not all 0"):
        group_advantages({"a": one}, {"a": 0.0}, "zscore")
    with pytest.raises(ValueError, match=">= 0"):
        group_advantages({"a": one, "b": one}, {"a": 1.0, "b": -1.0}, "zscore")
    with pytest.raises(ValueError, match="'zscore' or 'minmax'"):
        group_advantages({"a": one}, {"a": 1.0}, "rank")  # type: ignore[arg-type]


def test_check_failures_names_the_reward_and_the_share() -> None:
    counts = {"length": 0, "writing": 6}, {"length": 10, "writing": 10}
    with pytest.raises(TrainingStopped, match=r"'writing' failed for 60% of 10 .*limit 50%"):
        check_failures(*counts, 0.5, is_first_step=True)


def test_check_failures_calls_a_reward_that_never_scored_bad_input() -> None:
    counts = {"length": 0, "writing": 10}, {"length": 10, "writing": 10}
    with pytest.raises(UserError, match=r"failed for 100% of 10 .*how it is set up"):
        check_failures(*counts, 0.5, is_first_step=True)
    with pytest.raises(TrainingStopped, match=r"failed for 100% of 10 .*the same command goes on"):
        check_failures(*counts, 0.5, is_first_step=False)


def test_check_failures_accepts_the_limit_and_nothing_to_score() -> None:
    counts = {"length": 0, "writing": 5}, {"length": 0, "writing": 10}
    check_failures(*counts, 0.5, is_first_step=True)
    with pytest.raises(TrainingStopped, match="limit 0%"):
        check_failures({"writing": 1}, {"writing": 1000}, 0.0, is_first_step=False)


@given(
    st.lists(st.tuples(st.floats(-3, 3), st.booleans()), min_size=2, max_size=8),
    st.floats(0.01, 1),
)
def test_constrain_advantages_makes_every_violator_negative(
    members: list[tuple[float, bool]], gap: float
) -> None:
    advantages_PG = np.array([[advantage for advantage, _ in members]])
    breaks_PG = np.array([[breaks for _, breaks in members]])
    constrained_PG = constrain_advantages(advantages_PG, breaks_PG, gap)
    assert (constrained_PG[breaks_PG] <= -gap + 1e-9).all()
    if not breaks_PG.all():
        assert constrained_PG.mean() == pytest.approx(advantages_PG.mean(), abs=1e-9)
    # The order among violators, and among the others, stays.
    for side in (breaks_PG, ~breaks_PG):
        moved = (constrained_PG - advantages_PG)[side]
        assert np.ptp(moved) <= 1e-9 if moved.size else True
    if (advantages_PG[breaks_PG] <= -gap).all():
        np.testing.assert_array_equal(constrained_PG, advantages_PG)


def test_constrain_advantages_by_hand() -> None:
    # The violator has 0.5, one of four: it must fall by 0.6, so w = 0.8 and the others gain 0.2.
    constrained = constrain_advantages(
        np.array([[0.5, 0.5, -0.5, -0.5]]), np.array([[True, False, False, False]]), 0.1
    )
    np.testing.assert_allclose(constrained, [[-0.1, 0.7, -0.3, -0.3]])


def test_group_advantages_keep_constraints_and_comparisons() -> None:
    rewards = {
        "format": np.array([[1.0, 1.0, 0.0, math.nan]]),
        "writing": np.array([[-1.0, 0.0, 1.0, 1.0]]),
    }
    weights = {"format": 1.0, "writing": 1.0}
    plain = group_advantages(rewards, weights, "zscore", relative=["writing"])
    np.testing.assert_array_equal(plain.normalized["writing"], rewards["writing"])
    constraints = ConstraintConfig(rewards=("format",), minimum=1.0, gap=0.3)
    result = group_advantages(
        rewards, weights, "zscore", relative=["writing"], constraints=constraints
    )
    # Only the third sample breaks the constraint: what is missing cannot be below the minimum.
    expected = constrain_advantages(
        plain.advantages_PG, np.array([[False, False, True, False]]), 0.3
    )
    np.testing.assert_allclose(result.advantages_PG, expected)
    assert result.advantages_PG[0, 2] == pytest.approx(-0.3)
