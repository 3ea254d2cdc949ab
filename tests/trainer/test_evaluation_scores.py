"""Figures of the three benchmarks and of the monitor, against values computed by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lwz_trainer.errors import UserError
from lwz_trainer.evaluation.elo import arena_scores, fit_ratings, pairings
from lwz_trainer.evaluation.figures import Series, figure_svg
from lwz_trainer.evaluation.items import Criterion, Item, Requirement
from lwz_trainer.evaluation.monitor import (
    TrainingSample,
    overused_words,
    rank_correlation,
    system_signs,
    training_samples,
    wanted_range,
)
from lwz_trainer.evaluation.outcome import training_outcome
from lwz_trainer.evaluation.questions import DIMENSIONS
from lwz_trainer.evaluation.scores import (
    length_score,
    length_scores,
    quality_score,
    writing_scores,
)
from lwz_trainer.evaluation.tables import Table, table_csv, table_markdown
from lwz_trainer.train.records import write_records


def make_item(index: int, group: str, *criteria: str, **other: Any) -> Item:
    return Item(
        index=index,
        prompt="Write.",
        group=group,
        subgroup=f"{group} sub",
        criteria=tuple(Criterion(name, name, {}) for name in criteria),
        **other,
    )


def scored(**scores: int) -> dict[tuple[str, int, str], dict[str, Any]]:
    """a0_Tone=4: system a, index 0, criterion Tone."""
    result = {}
    for key, score in scores.items():
        place, name = key.split("_")
        result[place[0], int(place[1:]), name] = {"score": score}
    return result


def test_writing_scores_are_the_hand_computed_ones() -> None:
    items = [
        make_item(0, "Law", "Tone", "Length"),
        make_item(1, "Law", "Tone"),
        make_item(2, "Arts", "Tone", "Length", "Form"),
    ]
    judgments = scored(
        a0_Tone=4, a0_Length=8, a1_Tone=10, a2_Tone=1, a2_Length=2, a2_Form=6, b0_Tone=9
    )
    length = Requirement("length", (0, 2), ((0, "Length"), (2, "Length")))
    scores = writing_scores(items, judgments, "a", [length])
    assert scores.overall == pytest.approx((4 + 8 + 10 + 1 + 2 + 6) / 6)  # not a mean of means
    assert scores.items == {0: 6.0, 1: 10.0, 2: 3.0}
    assert scores.domains == {"Law": 8.0, "Arts": 3.0}
    assert scores.subdomains == {"Law sub": 8.0, "Arts sub": 3.0}
    assert scores.requirements == {"length": (4.5, 5.0)}
    assert (scores.num_scores, scores.num_missing) == (6, 0)


def test_writing_scores_leave_a_missing_criterion_out_of_every_mean() -> None:
    items = [make_item(0, "Law", "Tone", "Length"), make_item(1, "Arts", "Tone")]
    length = Requirement("length", (0,), ((0, "Length"),))
    scores = writing_scores(items, scored(a0_Tone=4), "a", [length])
    assert scores.overall == 4
    assert (scores.num_scores, scores.num_missing) == (1, 2)
    assert math.isnan(scores.domains["Arts"])
    assert scores.requirements["length"][0] == 4
    assert math.isnan(scores.requirements["length"][1])


@pytest.mark.parametrize(
    ("words", "target", "score"),
    [
        (100, 100, 100),
        (200, 100, 100 * (1 - 1 / 3)),
        (400, 100, 0),
        (500, 100, 0),
        (50, 100, 50),
        (80, 100, 100 * (1 - 0.25 / 2)),
        (33, 100, 0),
        (0, 100, 0),
    ],
)
def test_length_score_follows_the_formula(words: int, target: int, score: float) -> None:
    assert length_score(words, target) == pytest.approx(score)


def test_length_scores_are_the_hand_computed_ones() -> None:
    items = [
        make_item(0, "News", target=100),
        make_item(1, "News", target=600),
        make_item(2, "Story", target=9000),
        make_item(3, "Story", target=100),
    ]
    answers = {0: "word " * 100, 1: "word " * 1200, 2: ""}
    judgments = {
        ("a", 0, "quality"): dict(zip(DIMENSIONS, (5, 5, 5, 3, 3, 3), strict=True)),
        ("a", 2, "quality"): dict.fromkeys(DIMENSIONS, 1),
    }
    assert quality_score(judgments["a", 0, "quality"]) == 75
    scores = length_scores(items, answers, judgments, "a")
    assert scores.length == pytest.approx((100 + 200 / 3 + 0) / 3)
    assert scores.quality == pytest.approx((75 + 0) / 2)
    assert scores.dimensions["relevance"] == 50
    assert scores.dimensions["clarity"] == 25
    assert scores.bands["[0, 500)"] == (100, 75, 1)
    assert scores.bands["[500, 2000)"][0] == pytest.approx(200 / 3)
    assert math.isnan(scores.bands["[500, 2000)"][1])
    assert scores.bands["[4000, inf)"] == (0, 0, 1)
    assert scores.types["News"][2] == 2
    assert scores.num_missing == 2  # item 1 has no judgment, item 3 no answer
    assert scores.items[1][0] == 1200


def test_fit_ratings_of_two_players_is_the_log_odds() -> None:
    wins_RNN = np.array([[[0, 75], [25, 0]], [[0, 50], [50, 0]]], float)
    ratings_RN = fit_ratings(wins_RNN, virtual_ties=0)
    assert ratings_RN[0, 0] - ratings_RN[0, 1] == pytest.approx(400 * math.log10(3))
    assert ratings_RN[1] == pytest.approx([0, 0], abs=1e-6)


def test_fit_ratings_finds_the_ratings_that_made_the_games() -> None:
    true_N = np.array([-300.0, -40.0, 90.0, 250.0])
    chance_NN = 1 / (1 + 10 ** ((true_N[None] - true_N[:, None]) / 400))
    games_NN = np.array([[0, 10, 3, 0], [10, 0, 8, 5], [3, 8, 0, 20], [0, 5, 20, 0]])
    ratings_RN = fit_ratings((games_NN * chance_NN)[None], virtual_ties=0)
    assert ratings_RN[0] == pytest.approx(true_N, abs=1e-5)


def test_fit_ratings_of_a_clean_sweep_needs_virtual_ties() -> None:
    wins_RNN = np.array([[[0, 200], [0, 0]]], float)
    with pytest.raises(UserError, match=r"elo\.virtual_ties"):
        fit_ratings(wins_RNN, virtual_ties=0)
    ratings_RN = fit_ratings(wins_RNN, virtual_ties=1)
    assert ratings_RN[0, 0] - ratings_RN[0, 1] == pytest.approx(400 * math.log10(200.5 / 0.5))


def verdicts(winners: str) -> dict[tuple[str, int, str], dict[str, Any]]:
    """One letter a judgment, T for a tie: index 0 first and second, index 1 first and so on."""
    places = [(index, place) for index in range(len(winners) // 2) for place in ("first", "second")]
    return {
        ("mine", index, f"old/{place}"): {"winner": {"T": "tie"}.get(letter, letter)}
        for (index, place), letter in zip(places, winners, strict=True)
    }


def test_arena_scores_count_both_orders_and_half_ties() -> None:
    items = [make_item(i, "story", baselines={"old": "text"}) for i in range(4)]
    # In first place the system is A, in second place B: won twice, lost twice, A both times, ties.
    judgments = verdicts("AB" + "BA" + "AA" + "TT")
    played, num_missing = pairings(items, judgments, ["mine"])
    assert [pairing.outcomes for pairing in played] == [(1, 1), (0, 0), (1, 0), (0.5, 0.5)]
    scores = arena_scores(
        played, num_missing=num_missing, anchor=1000, virtual_ties=1, num_bootstrap=200, seed=0
    )
    assert scores.win_rate == {"mine": 0.5}
    assert scores.win_rates == {"mine": {"old": 0.5}}
    assert scores.agreement == {"mine": 0.75}
    rating, low, high = scores.ratings["mine"]
    assert rating == pytest.approx(1000)
    assert low < 1000 < high
    assert scores.ratings["old"] == pytest.approx((1000, 1000, 1000))  # the only anchor


def test_arena_scores_are_anchored_at_the_mean_of_the_baselines() -> None:
    items = [make_item(i, "story", baselines={"weak": "w", "strong": "s"}) for i in range(40)]
    judgments = {
        ("mine", i, f"{name}/{place}"): {
            "winner": ("A" if place == "first" else "B")
            if i < wins
            else ("B" if place == "first" else "A")
        }
        for i in range(40)
        for name, wins in (("weak", 30), ("strong", 10))
        for place in ("first", "second")
    }
    played, num_missing = pairings(items, judgments, ["mine"])
    scores = arena_scores(
        played, num_missing=num_missing, anchor=1200, virtual_ties=0, num_bootstrap=0, seed=0
    )
    gap = 400 * math.log10(3)
    assert scores.ratings["weak"][0] == pytest.approx(1200 - gap)
    assert scores.ratings["strong"][0] == pytest.approx(1200 + gap)
    assert scores.ratings["mine"][0] == pytest.approx(1200)
    assert math.isnan(scores.ratings["mine"][1])


def test_pairings_leave_out_half_a_pairing() -> None:
    items = [make_item(0, "story", baselines={"old": "text"})]
    judgments = verdicts("AB")
    del judgments["mine", 0, "old/second"]
    assert pairings(items, judgments, ["mine"]) == ([], 1)


def test_wanted_range_is_the_records_or_the_requests() -> None:
    assert wanted_range(make_item(0, "x", target=1000)) == (900, 1100)
    assert wanted_range(Item(0, "Write an essay of 2,000 words.", "x")) == (1800, 2200)
    assert wanted_range(Item(0, "Write an essay.", "x")) is None


def test_system_signs_are_the_hand_computed_ones() -> None:
    items = [make_item(i, "x", target=target) for i, target in enumerate((100, 100, 100, 10))]
    sentence = "The ferry left long before dawn and nobody at all said a word."
    answers = {0: "word " * 50, 1: "word " * 90, 2: "", 3: " ".join([sentence] * 4)}
    signs = system_signs(items, answers)
    assert (signs.num_answers, signs.num_empty, signs.num_with_range) == (4, 1, 4)
    assert signs.mean_words == (50 + 90 + 0 + 52) / 4
    assert (signs.in_range_frac, signs.short_frac, signs.long_frac) == (0.25, 0.5, 0.25)
    # One unit of one word over and over repeats itself; of four equal sentences three repeat.
    assert signs.redundancy == pytest.approx((1 + 1 + 0 + 0.75) / 4)
    assert signs.repetitive_frac == 0.75


def test_overused_words_finds_what_only_one_side_says() -> None:
    common = ["the ship went to the north and the crew slept"] * 30
    mine = [f"{text} in a rich tapestry" for text in common]
    found = overused_words(mine, common)
    assert {overused.word for overused in found} == {"in", "a", "rich", "tapestry"}
    tapestry = next(overused for overused in found if overused.word == "tapestry")
    assert (tapestry.count, tapestry.baseline_count) == (30, 0)
    # By hand: n = 420, m = 300, prior 500 · 30/720.
    prior = 500 * 30 / 720
    odds = math.log((30 + prior) / (420 + 500 - 30 - prior)) - math.log(prior / (300 + 500 - prior))
    assert tapestry.log_odds == pytest.approx(odds)
    assert tapestry.z == pytest.approx(odds / math.sqrt(1 / (30 + prior) + 1 / prior))
    assert overused_words(mine, []) == []


def test_overused_words_reads_chinese_and_caps_one_text() -> None:
    found = overused_words(["夜雨" * 400] + ["风平浪静"] * 40, ["风平浪静"] * 80)
    assert all(overused.count <= 10 for overused in found if overused.word in ("夜雨", "雨夜"))
    found = overused_words(["夜雨灯笼"] * 40, ["风平浪静"] * 40)
    assert {overused.word for overused in found} == {"夜雨", "雨灯", "灯笼"}


def test_overused_words_has_nothing_to_say_of_a_single_word() -> None:
    assert overused_words(["word word word"] * 3, ["word"]) == []
    assert overused_words(["word"], []) == []


def test_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: 4.5 / sqrt(4.5 · 5).
    assert rank_correlation([0, 1, 1, 2], [0, 5, 4, 9]) == pytest.approx(4.5 / math.sqrt(22.5))
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    assert math.isnan(rank_correlation([1, 2], [1, 2]))


def training(rewards: list[float], scores: list[int]) -> Any:
    samples = [
        TrainingSample(step, 0, Item(step, "Write.", "x"), "text", reward, 0.0, 1, is_judged=True)
        for step, reward in enumerate(rewards)
    ]
    judgments = {
        (f"training step {step}", step, "quality"): dict.fromkeys(DIMENSIONS, score)
        for step, score in enumerate(scores)
    }
    return training_outcome(samples, judgments)


def test_training_outcome_warns_where_reward_rises_and_judge_falls() -> None:
    hacked = training([0.1, 0.2, 0.5, 0.9], [4, 4, 2, 1])
    assert hacked.training["over_steps"] == pytest.approx(-0.9486833)
    assert "the judge's fell by 62.5" in hacked.warnings[0]
    assert hacked.tables[0].rows[3][:4] == (3, 1, 0.9, 0.0)
    assert len(hacked.figures) == 1
    assert training([0.1, 0.2, 0.5, 0.9], [1, 2, 4, 4]).warnings == []
    assert training([0.9, 0.5, 0.2, 0.1], [4, 4, 2, 1]).warnings == []


def test_tables_show_what_is_missing_as_missing() -> None:
    table = Table("t", "T", "n", ("a|b", "c"), (("x,y", math.nan), ("z", 1 / 3), ("w", None)))
    assert table_csv(table) == f'a|b,c\n"x,y",\nz,{1 / 3!r}\nw,\n'
    assert "| a\\|b | c |" in table_markdown(table)
    assert "| x,y | — |" in table_markdown(table)
    assert "| z | 0.33 |" in table_markdown(table)


def test_figure_svg_places_points_on_its_axes() -> None:
    svg = figure_svg(
        [Series("<b>", ((0.0, 0.0), (100.0, 10.0)), joined=True)],
        title="T",
        x_label="x",
        y_label="y",
    )
    # The axes end at the outermost ticks: left edge 64, right 610, bottom 334, top 12.
    assert 'cx="64.0" cy="334.0"' in svg
    assert 'cx="610.0" cy="12.0"' in svg
    assert "&lt;b&gt;" in svg
    assert "<b>" not in svg
    log = figure_svg(
        [Series("s", ((10.0, 0.0), (1000.0, 100.0)))],
        title="T",
        x_label="x",
        y_label="y",
        is_log=True,
        diagonal=True,
    )
    assert 'class="diagonal" x1="64.0" y1="334.0" x2="610.0" y2="12.0"' in log
    nothing = [Series("s", ((math.nan, 1.0),))]
    assert figure_svg(nothing, title="T", x_label="x", y_label="y") == ""


def test_training_samples_need_the_writing_reward(tmp_path: Path) -> None:
    row = {
        "prompt": "Write.",
        "group": 0,
        "member": 0,
        "answer": "text",
        "words_answer": 1,
        "redundancy": 0.0,
    }
    with pytest.raises(UserError, match="no readable samples"):
        training_samples(tmp_path, num_steps=2, per_step=2)
    write_records(tmp_path / "samples" / "step_00001.parquet", [row])
    with pytest.raises(UserError, match="has no column reward_writing"):
        training_samples(tmp_path, num_steps=2, per_step=2)
    rows = [
        row | {"group": g, "member": m, "reward_writing": g + m / 10}
        for g in (0, 1)
        for m in (0, 1)
    ]
    for step in (1, 2, 3):
        write_records(tmp_path / "samples" / f"step_{step:05d}.parquet", rows)
    samples = training_samples(tmp_path, num_steps=2, per_step=3)
    assert [sample.step for sample in samples] == [1] * 4 + [3] * 4
    # First members first, so that groups are covered before any has two.
    assert [sample.reward for sample in samples[:4]] == [0.0, 1.0, 0.1, 1.1]
    assert [sample.is_judged for sample in samples[:4]] == [True, True, True, False]
    assert [sample.group for sample in samples[:4]] == [0, 1, 0, 1]
    assert [sample.item.index for sample in samples] == list(range(8))
