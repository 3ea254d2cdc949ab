"""Writing requests: files and their errors, the bundled sets, the data order."""

import itertools
import json
import logging
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwz_trainer.data.prompts import BUNDLED_PROMPTS, Prompt, load_prompts, prompt_order
from lwz_trainer.errors import UserError


def _write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _bundled_rows(name: str) -> list[dict[str, Any]]:
    source = resources.files("lwz_trainer.data") / "bundled" / f"{name}.jsonl"
    return [json.loads(line) for line in source.read_text("utf-8").splitlines()]


def test_load_prompts_reads_jsonl(tmp_path: Path) -> None:
    path = _write_jsonl(
        tmp_path / "requests.jsonl",
        [
            {"prompt": "A story.", "length_range": [100, 200], "id": 7},
            {"prompt": "写一个故事 in English", "length_range": None},
            {"prompt": "No range at all"},
        ],
    )
    assert load_prompts(path) == [
        Prompt("A story.", (100, 200), "en", 1),
        Prompt("写一个故事 in English", None, "zh", 2),
        Prompt("No range at all", None, "en", 3),
    ]


def test_load_prompts_numbers_rows_by_line_past_blank_lines_and_byte_order_mark(
    tmp_path: Path,
) -> None:
    path = tmp_path / "requests.jsonl"
    # U+2028 is a line separator to str.splitlines() but an ordinary character in JSON.
    path.write_bytes(
        b'\xef\xbb\xbf{"prompt": "one"}\r\n\r\n{"prompt": "t' + "\u2028".encode() + b'wo"}'
    )
    assert load_prompts(str(path)) == [
        Prompt("one", None, "en", 1),
        Prompt("t\u2028wo", None, "en", 3),
    ]


def test_load_prompts_reads_parquet(tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    table = pyarrow.table(
        {
            "prompt": ["A story.", "写信", "Cannot be done"],
            "length_range": [[100, 200], None, [0, 0]],
            "note": [1, 2, 3],
        }
    )
    pyarrow.parquet.write_table(table, path)
    assert load_prompts(str(path)) == [
        Prompt("A story.", (100, 200), "en", 1),
        Prompt("写信", None, "zh", 2),
    ]


def test_load_prompts_reads_parquet_without_ranges(tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["A story."]}), path)
    assert load_prompts(str(path)) == [Prompt("A story.", None, "en", 1)]


def test_load_prompts_drops_and_counts_zero_ranges(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": "Summarise the attached file", "length_range": [0, 0]},
        {"prompt": "A story.", "length_range": [0, 200]},
        {"prompt": "Fix my essay below", "length_range": [0, 0]},
    ]
    path = _write_jsonl(tmp_path / "requests.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        assert load_prompts(path) == [Prompt("A story.", (0, 200), "en", 2)]
    assert caplog.messages == [f"{path}: dropped 2 of 3 rows, whose length_range is [0, 0]"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 'x'}", r"line 2 is not valid JSON \(.*\); expected one object per line"),
        ('["x"]', "line 2 holds a list; expected an object with a `prompt`"),
        ('{"text": "x", "id": 1}', "line 2 has no `prompt`; its fields are: text, id"),
        ("{}", "line 2 has no `prompt`; its fields are: none"),
        ('{"prompt": 3}', "line 2: prompt must be a string, got int"),
        ('{"prompt": null}', "line 2: prompt must be a string, got NoneType"),
        ('{"prompt": " \\n"}', "line 2: prompt is empty; write a request or remove the row"),
        ('{"prompt": "x \\ud800"}', "line 2: prompt holds half of a surrogate pair"),
        (
            '{"prompt": "x", "references": ["y \\udfff"]}',
            "line 2: references holds half of a surrogate pair",
        ),
        ('{"prompt": "x", "length_range": 5}', r"two integers \[lo, hi\], got 5"),
        ('{"prompt": "x", "length_range": [5]}', r"two integers \[lo, hi\], got \[5\]"),
        ('{"prompt": "x", "length_range": [1.0, 2]}', r"two integers .* got \[1.0, 2\]"),
        ('{"prompt": "x", "length_range": [false, true]}', r"two integers .* got \[False, True\]"),
        ('{"prompt": "x", "length_range": ["1", 2]}', r"two integers .* got \['1', 2\]"),
        ('{"prompt": "x", "length_range": [9, 3]}', r"must have 0 <= lo < hi, got \[9, 3\]"),
        ('{"prompt": "x", "length_range": [9, 9]}', r"must have 0 <= lo < hi, got \[9, 9\]"),
        ('{"prompt": "x", "length_range": [-1, 9]}', r"must have 0 <= lo < hi, got \[-1, 9\]"),
    ],
)
def test_load_prompts_names_the_bad_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "good"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(str(path))
    assert f"{path} line 2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_prompts_refuses_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text("\n \n", encoding="utf-8")
    with pytest.raises(UserError, match=r"requests\.jsonl is empty; expected at least one row"):
        load_prompts(str(path))


def test_load_prompts_refuses_a_file_of_zero_ranges(tmp_path: Path) -> None:
    path = _write_jsonl(tmp_path / "requests.jsonl", [{"prompt": "x", "length_range": [0, 0]}])
    with pytest.raises(UserError, match=r"requests.jsonl: every row \(1\) has the length_range"):
        load_prompts(path)


def test_load_prompts_refuses_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such prompt file: .*requests\.jsonl"):
        load_prompts(str(tmp_path / "requests.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=r"no such prompt file: .*folder\.jsonl"):
        load_prompts(str(tmp_path / "folder.jsonl"))


@pytest.mark.parametrize("name", ["requests.csv", "writings", "requests.json"])
def test_load_prompts_names_the_supported_sources(name: str) -> None:
    message = f"cannot read prompts from '{name}'; expected a .jsonl or .parquet file or one of"
    with pytest.raises(UserError, match=message + " the bundled sets: writing, demo"):
        load_prompts(name)


def test_load_prompts_refuses_other_encodings(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_bytes('{"prompt": "写信"}'.encode("gb18030"))
    with pytest.raises(UserError, match=r"requests\.jsonl is not UTF-8 .*; save it as UTF-8"):
        load_prompts(str(path))


def test_load_prompts_names_the_bad_parquet_row(tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["good", None]}), path)
    with pytest.raises(
        UserError, match=r"requests\.parquet row 2: prompt must be a string, got None"
    ):
        load_prompts(str(path))


def test_load_prompts_refuses_parquet_without_prompt_column(tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["x"], "id": [1]}), path)
    with pytest.raises(UserError, match="has no column `prompt`; its columns are: question, id"):
        load_prompts(str(path))


def test_load_prompts_refuses_empty_and_broken_parquet(tmp_path: Path) -> None:
    empty = tmp_path / "empty.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], "string")}), empty)
    with pytest.raises(UserError, match=r"empty\.parquet is empty"):
        load_prompts(str(empty))
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"broken\.parquet is not a readable parquet file"):
        load_prompts(str(broken))


@pytest.mark.parametrize("name", BUNDLED_PROMPTS)
def test_bundled_rows_have_the_schema(name: str) -> None:
    rows = _bundled_rows(name)
    prompts = load_prompts(name)
    assert len(prompts) == len(rows)
    for row, prompt in zip(rows, prompts, strict=True):
        assert set(row) == {"prompt", "length_range", "language", "type"}
        assert row["prompt"] == row["prompt"].strip() == prompt.prompt
        assert row["language"] == prompt.language
        assert tuple(row["length_range"]) == prompt.length_range
        assert re.fullmatch("[a-z]+", row["type"])


@pytest.mark.parametrize("name", BUNDLED_PROMPTS)
def test_bundled_ranges_are_round_and_within_the_methods_limits(name: str) -> None:
    for row in _bundled_rows(name):
        low, high = row["length_range"]
        assert 0 < low < high <= 12_000, row
        assert high - low <= 3_000, row
        for bound in (low, high):
            assert bound % (100 if bound > 1_000 else 10) == 0, row


@pytest.mark.parametrize("name", BUNDLED_PROMPTS)
def test_bundled_ranges_hold_every_length_that_the_request_states(name: str) -> None:
    num_stated = 0
    for row in _bundled_rows(name):
        low, high = row["length_range"]
        english = r"(\d[\d,]*)(?:(?:-| to | and )(\d[\d,]*))?[ -]words?\b"
        chinese = r"(\d+)(?:到(\d+))?字"
        for match in re.finditer(english if row["language"] == "en" else chinese, row["prompt"]):
            num_stated += 1
            stated = [int(text.replace(",", "")) for text in match.groups() if text]
            if len(stated) == 2:
                assert [low, high] == stated, row
            else:
                assert 0.7 * stated[0] <= low <= stated[0] <= high <= 1.3 * stated[0], row
    assert num_stated >= 40


@pytest.mark.parametrize("name", BUNDLED_PROMPTS)
def test_bundled_prompts_have_no_near_duplicates(name: str) -> None:
    # The demo's requests are short and share their asking words ("between 40 and 80 words"), so
    # only what is asked for is compared: words of four letters and more, one by one.
    def shingles(row: dict[str, Any]) -> set[str]:
        text = row["prompt"].lower()
        if name == "demo":
            asking = {"write", "describe", "about", "words", "between", "short", "paragraph"}
            return set(re.findall("[a-z]{4,}", text)) - asking
        if row["language"] == "zh":
            return {text[i : i + 2] for i in range(len(text) - 1)}
        words = re.findall(r"\w+", text)
        return {" ".join(words[i : i + 2]) for i in range(len(words) - 1)}

    rows = [(row["prompt"], shingles(row)) for row in _bundled_rows(name)]
    for (one, shingles_one), (two, shingles_two) in itertools.combinations(rows, 2):
        similarity = len(shingles_one & shingles_two) / len(shingles_one | shingles_two)
        assert similarity < (0.5 if name == "demo" else 0.2), (similarity, one, two)


def test_bundled_writing_covers_languages_and_scales() -> None:
    prompts = load_prompts("writing")
    assert len(prompts) >= 200
    for language in ("en", "zh"):
        highs = [p.length_range[1] for p in prompts if p.language == language and p.length_range]
        assert len(highs) >= 80
        edges = [0, 100, 300, 700, 1_500, 3_000, 6_000, 12_000]
        for low, high in itertools.pairwise(edges):
            assert sum(low < bound <= high for bound in highs) >= 6, (language, low, high)


def test_bundled_demo_is_short_and_english() -> None:
    prompts = load_prompts("demo")
    assert len(prompts) == 64
    assert {p.language for p in prompts} == {"en"}
    assert {p.length_range for p in prompts} == {(30, 60), (40, 60), (40, 80), (60, 100)}


@given(
    num_prompts=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 60),
    counts=st.lists(st.integers(0, 15), max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_prompt_order_does_not_depend_on_how_it_is_split(
    num_prompts: int, seed: int, start: int, counts: list[int]
) -> None:
    whole = prompt_order(num_prompts, seed, start, sum(counts))
    pieces: list[int] = []
    for count in counts:
        pieces += prompt_order(num_prompts, seed, start + len(pieces), count)
    assert pieces == whole
    assert prompt_order(num_prompts, seed, 0, start + sum(counts))[start:] == whole


def test_prompt_order_visits_every_prompt_once_per_epoch() -> None:
    order = prompt_order(10, 3, 0, 30)
    epochs = [order[start : start + 10] for start in (0, 10, 20)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_prompt_order_changes_with_the_seed() -> None:
    assert prompt_order(50, 0, 0, 50) != prompt_order(50, 1, 0, 50)
    # A seed beyond 32 bits is not mistaken for a smaller one at another epoch.
    assert prompt_order(50, 2**32, 0, 50) != prompt_order(50, 0, 50, 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 0, 1), "num_prompts must be at least 1, got 0"),
        ((5, -1, 0, 1), "must not be negative, got -1, 0 and 1"),
        ((5, 0, -2, 1), "must not be negative, got 0, -2 and 1"),
        ((5, 0, 0, -3), "must not be negative, got 0, 0 and -3"),
    ],
)
def test_prompt_order_refuses_numbers_out_of_range(
    arguments: tuple[int, int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_order(*arguments)
