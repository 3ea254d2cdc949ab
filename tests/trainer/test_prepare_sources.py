"""Rows of WildChat-1M, LMSYS-Chat-1M and plain JSONL, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lwz_trainer.errors import UserError
from lwz_trainer.prepare.sources import SourceRow, find_files, read_rows


def turn(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"content": content, "role": role, **fields}


# Field names and nesting of the two data sets' own files.
WILDCHAT = [
    {
        "conversation_hash": "a1",
        "model": "gpt-4-0314",
        "conversation": [
            turn("user", " Write an essay. ", language="English", toxic=False, turn_identifier=1),
            turn("assistant", "No.", language="English", toxic=False, turn_identifier=1),
            turn("user", "Please!", language="English", toxic=False, turn_identifier=2),
        ],
        "turn": 2,
        "language": "English",
        "openai_moderation": [{"categories": {"hate": False}, "flagged": False}] * 2,
        "toxic": False,
        "redacted": False,
        "header": {"user-agent": "x"},
    },
    {
        "conversation_hash": "a2",
        "model": "gpt-4-0314",
        "conversation": [turn("user", "写一篇", language="Chinese", toxic=True, turn_identifier=3)],
        "turn": 1,
        "language": "Chinese",
        "openai_moderation": [{"categories": {"hate": False}, "flagged": False}],
        "toxic": True,
        "redacted": False,
        "header": {"user-agent": "x"},
    },
]
LMSYS = [
    {
        "conversation_id": "b1",
        "model": "vicuna-13b",
        "conversation": [turn("user", "Hi NAME_1"), turn("assistant", "Hi")],
        "turn": 1,
        "language": "English",
        "openai_moderation": [{"category_scores": {"hate": 0.9}, "flagged": True}],
        "redacted": False,
    },
    {
        "conversation_id": "b2",
        "model": "vicuna-13b",
        "conversation": [turn("assistant", "Hello"), turn("user", "Escribe")],
        "turn": 1,
        "language": "Spanish",
        "openai_moderation": [{"category_scores": {"hate": 0.1}, "flagged": False}],
        "redacted": True,
    },
    {
        "conversation_id": "b3",
        "model": "vicuna-13b",
        "conversation": [],
        "turn": 0,
        "language": "unknown",
        "openai_moderation": [],
        "redacted": False,
    },
]
PLAIN: list[dict[str, Any]] = [
    {"prompt": "Write.", "length_range": [100, 200]},
    {"prompt": "Write more.", "length_range": None},
    {"prompt": None, "length_range": [0, 0]},
]


def expected_rows(name: str, where: str) -> list[SourceRow]:
    fields: list[tuple[Any, ...]] = {
        "wildchat": [("Write an essay.", "English", False), ("写一篇", "Chinese", True)],
        "lmsys": [
            ("Hi NAME_1", "English", True),
            ("Escribe", "Spanish", True),
            ("", "unknown", False),
        ],
        "plain": [
            ("Write.", "", False, (100, 200)),
            ("Write more.", "", False, None),
            ("", "", False, (0, 0)),
        ],
    }[name]
    return [
        SourceRow(text, f"{where} {number}", *rest)
        for number, (text, *rest) in enumerate(fields, start=1)
    ]


ROWS = {"wildchat": WILDCHAT, "lmsys": LMSYS, "plain": PLAIN}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_read_rows_takes_the_first_user_turn(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS[name]), path)
    else:
        write_jsonl(path, ROWS[name])
    unit = "row" if suffix == "parquet" else "line"
    assert list(read_rows(path)) == expected_rows(name, f"{path} {unit}")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[1]", "line 2 holds a list"),
        ('{"text": "a"}', "line 2 has neither `conversation` nor `prompt`; its fields are: text"),
        ('{"prompt": 3}', "line 2: prompt must be a string, got int"),
        ('{"conversation": "a"}', "line 2: conversation must be a list, got str"),
        ('{"conversation": ["a"]}', "line 2: each turn of a conversation must be an object"),
        ('{"conversation": [{"role": "user"}]}', "line 2: each turn of a conversation"),
        ('{"conversation": [{"role": "user", "content": 1}]}', "line 2: content must be a string"),
        ('{"prompt": "a", "length_range": [5]}', "line 2: length_range must be two integers"),
        ('{"prompt": "a", "length_range": [5, 5]}', "line 2: length_range must be"),
        ('{"prompt": "a", "length_range": [0, true]}', "line 2: length_range must be"),
    ],
)
def test_read_rows_names_the_bad_line(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "good"}}\n{line}\n')
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_read_rows_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"rows\.parquet is not a readable parquet file"):
        list(read_rows(path))
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(UserError, match=r"has neither `conversation` nor `prompt`.*: text"):
        list(read_rows(path))
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl is not UTF-8 \(line 2"):
        list(read_rows(tmp_path / "rows.jsonl"))


def test_find_files_looks_into_directories(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    names = ["b.jsonl", "data/train-1.parquet", "data/train-0.parquet"]
    for name in [*names, "README.md"]:
        (tmp_path / name).write_text("")
    assert find_files(str(tmp_path)) == [tmp_path / name for name in sorted(names)]
    assert find_files(str(tmp_path / "b.jsonl")) == [tmp_path / "b.jsonl"]
    with pytest.raises(UserError, match=r"expected a \.parquet or \.jsonl file, got '\.md'"):
        find_files(str(tmp_path / "README.md"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.parquet or \.jsonl file"):
        find_files(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no input at /no/such/place"):
        find_files("/no/such/place")


def test_find_files_asks_the_hub_for_what_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def download(repo_id: str, **options: Any) -> str:
        assert (repo_id, options["repo_type"]) == ("allenai/WildChat-1M", "dataset")
        assert options["allow_patterns"] == ["*.parquet", "*.jsonl"]
        return str(tmp_path)

    for name in ("train-1.parquet", "train-0.parquet", "README.md"):
        (tmp_path / name).touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = find_files("allenai/WildChat-1M")
    assert [file.name for file in found] == ["train-0.parquet", "train-1.parquet"]

    def offline(repo_id: str, **options: Any) -> str:
        assert repo_id == "allenai/WildChat-1M"
        assert options["repo_type"] == "dataset"
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="allenai/WildChat-1M is no local path, and downloading"):
        find_files("allenai/WildChat-1M")
