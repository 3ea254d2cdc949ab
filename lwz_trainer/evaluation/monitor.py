"""Signs that a policy games its rewards: restating itself, missing its length, pet words.

A scalar reward model can be led to high scores by degenerate text, so these figures stand beside
the judge's. Pure arithmetic on texts; `training_samples` reads the samples that a run has recorded.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lwz_trainer.config.rewards import FormatRewardConfig
from lwz_trainer.data.length_range import explicit_length_range
from lwz_trainer.errors import UserError
from lwz_trainer.evaluation.items import Item
from lwz_trainer.evaluation.means import mean_of
from lwz_trainer.rewards.redundancy import shingle_redundancy
from lwz_trainer.rewards.text import count_words
from lwz_trainer.view.samples import find_sample_files
from lwz_trainer.view.steps import spread_steps

__all__ = [
    "Overused",
    "SystemSigns",
    "TrainingSample",
    "favoured_words",
    "grown_words",
    "overused_words",
    "rank_correlation",
    "system_signs",
    "training_samples",
    "wanted_range",
]

# A fifth of the passages restating earlier ones is seen by any reader.
_REPETITIVE = 0.2
_LATIN_WORD = re.compile(r"[a-zà-öø-ÿ]+(?:['’][a-z]+)?")
_CHINESE_RUN = re.compile(r"[\u4e00-\u9fff]{2,}")


@dataclass(frozen=True)
class SystemSigns:
    """Length and repetition of one system's answers; NaN where there is none.

    Attributes:
        num_answers, num_empty: answers, and those without text.
        mean_words: of all answers.
        redundancy: mean share of passages that repeat an earlier one.
        repetitive_frac: share of answers with a redundancy above 0.2.
        num_with_range: answers to requests whose range is known.
        in_range_frac, short_frac, long_frac: of those.
        length_ratio: mean of words / middle of the range.
    """

    num_answers: int
    num_empty: int
    mean_words: float
    redundancy: float
    repetitive_frac: float
    num_with_range: int
    in_range_frac: float
    short_frac: float
    long_frac: float
    length_ratio: float


@dataclass(frozen=True)
class Overused:
    """A word used more than in the baseline texts.

    Attributes:
        word: lower case; Chinese: a pair of characters.
        z: log-odds ratio over its standard deviation.
        log_odds: natural logarithm of the smoothed odds ratio.
        count, baseline_count: uses.
    """

    word: str
    z: float
    log_odds: float
    count: int
    baseline_count: int


@dataclass(frozen=True)
class TrainingSample:
    """A sample of a run.

    Attributes:
        step: of the run.
        group: samples of one step and group answer one request.
        item: its prompt, numbered within all samples that are read.
        answer: text without thinking.
        reward: the reward model's score; NaN where it failed.
        redundancy: as recorded.
        num_words: of the answer.
        is_judged: it is one of those that the judge is asked about.
    """

    step: int
    group: int
    item: Item
    answer: str
    reward: float
    redundancy: float
    num_words: int
    is_judged: bool


def wanted_range(item: Item) -> tuple[int, int] | None:
    """Words that the record asks for (±10%), else what the request says; None if neither does."""
    if item.target is not None:
        return round(0.9 * item.target), round(1.1 * item.target)
    found = explicit_length_range(item.prompt)
    return None if found == (0, 0) else found  # (0, 0): more than training asks for


def system_signs(items: Sequence[Item], answers: Mapping[int, str]) -> SystemSigns:
    """Length and repetition; redundancy as in the default format reward."""
    form = FormatRewardConfig()
    answered = [item for item in items if item.index in answers]
    texts = [answers[item.index] for item in answered]
    num_words = [count_words(text) for text in texts]
    redundancy = [
        shingle_redundancy(text, threshold=form.threshold, shingle_size=form.shingle_size).score
        for text in texts
    ]
    ranged = [
        (words, wanted)
        for words, item in zip(num_words, answered, strict=True)
        if (wanted := wanted_range(item)) is not None
    ]
    return SystemSigns(
        num_answers=len(texts),
        num_empty=sum(not text for text in texts),
        mean_words=mean_of(num_words),
        redundancy=mean_of(redundancy),
        repetitive_frac=mean_of([share > _REPETITIVE for share in redundancy]),
        num_with_range=len(ranged),
        in_range_frac=mean_of([low <= words <= high for words, (low, high) in ranged]),
        short_frac=mean_of([words < low for words, (low, _) in ranged]),
        long_frac=mean_of([words > high for words, (_, high) in ranged]),
        length_ratio=mean_of([2 * words / (low + high) for words, (low, high) in ranged]),
    )


def overused_words(
    texts: Sequence[str], baseline: Sequence[str], *, prior_weight: float = 500.0, most: int = 25
) -> list[Overused]:
    """Words whose odds are above the baseline's, the surest first.

    Log-odds ratio with an informative Dirichlet prior (Monroe, Colaresi and Quinn, Political
    Analysis 2008): with a_w = prior_weight · (share of w in both sets), a_0 = prior_weight,

        δ_w = ln (y_w + a_w)/(n + a_0 − y_w − a_w) − ln (b_w + a_w)/(m + a_0 − b_w − a_w)
        z_w = δ_w / sqrt(1/(y_w + a_w) + 1/(b_w + a_w))

    A word counts at most ten times in a text, so that one degenerate answer is not the list.

    Args:
        texts: of the system.
        baseline: to compare with.
        prior_weight: pseudo-count of all words together.
        most: length of the list; words with z below 1.96 are left out.
    """
    mine, others = _word_counts(texts), _word_counts(baseline)
    n, m = mine.total(), others.total()
    if not n or not m or len(mine.keys() | others.keys()) == 1:
        return []  # a single word has no odds against others
    found = []
    for word, count in mine.items():
        prior = prior_weight * (count + others[word]) / (n + m)
        a, b = count + prior, others[word] + prior
        log_odds = math.log(a / (n + prior_weight - a)) - math.log(b / (m + prior_weight - b))
        z = log_odds / math.sqrt(1 / a + 1 / b)
        if z >= 1.96:
            found.append(Overused(word, z, log_odds, count, others[word]))
    return sorted(found, key=lambda overused: (-overused.z, overused.word))[:most]


def training_samples(run_dir: Path, *, num_steps: int, per_step: int) -> list[TrainingSample]:
    """Samples of evenly spread steps of a run, the first members of its groups first.

    Args:
        run_dir: with `samples/step_*.parquet`.
        num_steps: at most so many steps, the first and the last among them.
        per_step: so many samples of a step are judged.

    Raises:
        UserError: no samples, a file that cannot be read, or no reward model's score in them.
    """
    files, _ = find_sample_files(run_dir)
    if not files:
        raise UserError(
            f"{run_dir} has no readable samples/step_*.parquet; pass the directory of a run"
        )
    path_of = {file.step: file.path for file in files}
    samples: list[TrainingSample] = []
    for step in spread_steps(sorted(path_of), num_steps):
        rows = _sample_rows(path_of[step])
        rows.sort(key=lambda row: (row["member"], row["group"]))
        for place, row in enumerate(rows):
            reward = row["reward_writing"]
            samples.append(
                TrainingSample(
                    step=step,
                    group=row["group"],
                    item=Item(index=len(samples), prompt=row["prompt"], group=f"step {step}"),
                    answer=row["answer"],
                    reward=math.nan if reward is None else reward,
                    redundancy=row["redundancy"],
                    num_words=row["words_answer"],
                    is_judged=place < per_step,
                )
            )
    return samples


def favoured_words(samples: Sequence[TrainingSample]) -> list[Overused]:
    """Words of the answers that the reward model put above their group's mean, against the others.

    A group has one request, so its subject is on both sides.
    """
    groups: dict[tuple[int, int], list[TrainingSample]] = {}
    for sample in samples:
        if math.isfinite(sample.reward):
            groups.setdefault((sample.step, sample.group), []).append(sample)
    above: list[str] = []
    others: list[str] = []
    for members in groups.values():
        mean = mean_of([member.reward for member in members])
        for member in members:
            (above if member.reward > mean else others).append(member.answer)
    return overused_words(above, others)


def grown_words(samples: Sequence[TrainingSample]) -> list[Overused]:
    """Words of the later half of the steps, against the earlier half."""
    steps = sorted({sample.step for sample in samples})
    half = len(steps) // 2
    earlier, later = set(steps[:half]), set(steps[len(steps) - half :])
    return overused_words(
        [sample.answer for sample in samples if sample.step in later],
        [sample.answer for sample in samples if sample.step in earlier],
    )


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's, ties at their mean rank; NaN for fewer than three pairs or no spread."""
    if len(x) != len(y):
        raise ValueError(f"x and y must have one length, got {len(x)} and {len(y)}")
    if len(x) < 3:
        return math.nan
    a, b = _ranks(x), _ranks(y)
    mean = (len(x) + 1) / 2
    spread = math.sqrt(sum((r - mean) ** 2 for r in a) * sum((r - mean) ** 2 for r in b))
    if spread == 0:
        return math.nan
    return sum((r - mean) * (s - mean) for r, s in zip(a, b, strict=True)) / spread


def _sample_rows(path: Path) -> list[dict]:
    columns = ["prompt", "group", "member", "answer", "words_answer", "redundancy"]
    try:
        present = pq.read_schema(path).names
        missing = [name for name in [*columns, "reward_writing"] if name not in present]
        if missing:
            raise UserError(
                f"{path} has no column {missing[0]}; expected samples of a run whose writing "
                "reward is on"
            )
        return pq.read_table(path, columns=[*columns, "reward_writing"]).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path} ({error}); remove this file") from error


def _word_counts(texts: Sequence[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        for word, count in Counter(_words(text.lower())).items():
            counts[word] += min(count, 10)
    return counts


def _words(text: str) -> list[str]:
    """Latin words, and every pair of neighbouring Chinese characters."""
    runs = _CHINESE_RUN.findall(text)
    pairs = [run[start : start + 2] for run in runs for start in range(len(run) - 1)]
    return _LATIN_WORD.findall(text) + pairs


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first: dict[float, int] = {}
    for place, value in enumerate(ordered, start=1):
        first.setdefault(value, place)
    counts = Counter(values)
    return [first[value] + (counts[value] - 1) / 2 for value in values]
