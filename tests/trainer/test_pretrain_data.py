"""Rows to windows, windows to batches, and a stream that goes on anywhere."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from lwz_trainer.config.pretrain import TextDataConfig
from lwz_trainer.errors import UserError
from lwz_trainer.pretrain.rows import RowReader
from lwz_trainer.pretrain.stream import BatchReader, MixedStream, SourceStream
from lwz_trainer.pretrain.windows import Window, cut_document, deal_windows
from tests.trainer.pretrain_case import ANSWER_ONLY
from tests.trainer.tiny import make_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tiny_tokenizer()


def reader_of(tokenizer: PreTrainedTokenizerBase, **fields: Any) -> RowReader:
    return RowReader(TextDataConfig(**({"template": str(ANSWER_ONLY)} | fields)), tokenizer)


def read_rows(reader: RowReader, path: Path, *rows: Any) -> list[tuple[int, list[Window]]]:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return list(reader.read(0, path, 0))


@given(length=st.integers(0, 60), context=st.integers(1, 20))
def test_cut_document_predicts_every_token_but_the_first_once(length: int, context: int) -> None:
    windows = cut_document(0, "here", list(range(length)), context_tokens=context)
    predicted = [token for w in windows for token in w.ids[w.num_given :].tolist()]
    assert predicted == list(range(1, length))
    assert all(w.num_tokens <= context for w in windows)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    num_shares=st.integers(1, 5),
)
def test_deal_windows_gives_each_window_once_and_balances(
    lengths: list[int], num_shares: int
) -> None:
    windows = [Window(0, "", np.zeros(n + 1, np.int32), 1) for n in lengths]
    shares = deal_windows(windows, num_shares)
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in share) for share in shares]
    assert max(totals) - min(totals) <= max(lengths)


def test_reader_ends_documents_and_passes_over_empty_ones(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = read_rows(
        reader_of(tokenizer), tmp_path / "a.jsonl", {"text": "The sea."}, {"text": " "}
    )
    (_, [window]), (number, nothing) = rows
    assert tokenizer.decode(window.ids) == "The sea.<|im_end|>"
    assert window.num_given == 1
    assert (number, nothing) == (2, [])


@pytest.mark.parametrize(("loss_on", "first"), [("answer", "The"), ("all", "|")])
def test_reader_learns_replies_or_all(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, loss_on: str, first: str
) -> None:
    reader = reader_of(tokenizer, loss_on=loss_on)
    ((_, [window]),) = read_rows(
        reader, tmp_path / "a.jsonl", {"prompt": "Write!", "answer": "The sea."}
    )
    assert tokenizer.decode(window.ids) == (
        "<|user|>: Write! <|assistant|>: <answer>The sea.</answer><|im_end|>"
    )
    predicted = tokenizer.decode(window.ids[window.num_given :])
    assert predicted.startswith(first)


def test_reader_writes_thinking_into_the_think_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = {"prompt": "Write!", "thinking": "First plan.", "answer": "The sea."}
    for template, tail in (
        ("think", "<|assistant|>: <think>First plan.</think>\n<answer>The sea.</answer><|im_end|>"),
        ("direct", "<|assistant|>: <answer>The sea.</answer><|im_end|>"),
    ):
        reader = reader_of(tokenizer, template=template)
        ((_, [window]),) = read_rows(reader, tmp_path / "a.jsonl", row)
        assert tokenizer.decode(window.ids).endswith(f"<|user|>: Write! {tail}")


def test_reader_takes_conversations_through_the_chat_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    reader = reader_of(tokenizer, template="chat", loss_on="answer")
    turns = [("user", "Hi"), ("assistant", "Yes?"), ("user", "Write!"), ("assistant", "The sea.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    ((_, [window]),) = read_rows(reader, tmp_path / "a.jsonl", {"messages": messages})
    assert tokenizer.decode(window.ids[window.num_given :]) == "The sea.<|im_end|>\n"
    assert tokenizer.decode(window.ids).startswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>")


def test_reader_opens_tags_in_the_chat_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = {"prompt": "Write!", "thinking": "Plan.", "answer": "The sea."}
    reader = reader_of(tokenizer, template="chat", chat_opened="<think>", loss_on="answer")
    ((_, [window]),) = read_rows(reader, tmp_path / "a.jsonl", row)
    given_text = tokenizer.decode(window.ids[: window.num_given])
    assert given_text.endswith("<|im_start|>assistant\n<think>")
    assert tokenizer.decode(window.ids[window.num_given :]) == (
        "Plan.</think>\n<answer>The sea.</answer><|im_end|>\n"
    )


def test_reader_passes_over_a_conversation_that_the_chat_template_refuses(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('first a user') }}{% endif %}"
        "{{ messages[0]['content'] }}:{{ messages[1]['content'] if messages[1:] }}"
    )
    reader = reader_of(tokenizer, template="chat")
    rows = [
        {"messages": [{"role": role, "content": "Write!"}, {"role": "assistant", "content": "Yes"}]}
        for role in ("user", "system")
    ]
    assert [len(windows) for _, windows in read_rows(reader, tmp_path / "a.jsonl", *rows)] == [1, 0]
    assert "line 2: the chat template refuses the messages: first a user" in reader.reasons(0)[0]


def test_reader_cuts_a_long_reply_at_its_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    reader = reader_of(tokenizer, context_tokens=64, loss_on="answer")
    row = {"prompt": "Write!", "answer": "The sea. " * 50}
    ((_, [window]),) = read_rows(reader, tmp_path / "a.jsonl", row)
    assert window.num_tokens == 64
    assert not tokenizer.decode(window.ids).endswith("<|im_end|>")


def test_reader_goes_on_after_the_rows_it_is_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = [f"Day {i}." for i in range(150)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=40)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    reader = reader_of(tokenizer)
    for path in (tmp_path / "a.parquet", tmp_path / "a.jsonl"):
        for start in (0, 1, 40, 77, 149, 150):
            rows = list(reader.read(0, path, start))
            assert [number for number, _ in rows] == list(range(start + 1, 151))
            found = [tokenizer.decode(windows[0].ids) for _, windows in rows]
            assert found == [f"{text}<|im_end|>" for text in texts[start:]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("[1]", r"line 2 holds a list"),
        ("{", r"line 2 is not valid JSON"),
        ('{"text": 3}', r"line 2: text must be a string, got int"),
        ('{"prompt": "a"}', r"line 2 has neither `text`, nor `prompt` and `answer`"),
        ('{"prompt": "a", "answer": 3}', r"line 2: answer must be a string"),
        ('{"messages": []}', r"line 2: messages must be a list of at least two"),
        (
            '{"messages": [{"role": "a", "content": "b"}, {"role": "user", "content": "c"}]}',
            r"line 2: the last message must be the assistant's, got 'user'",
        ),
        (
            '{"messages": [{"role": "user", "content": "b"}, '
            '{"role": "assistant", "content": "c"}]}',
            r"line 2 holds messages, which need data.template=chat",
        ),
    ],
)
def test_reader_names_the_line_of_a_bad_row_or_passes_over_it(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
    row: str,
    expected: str,
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "The sea."}\n' + row + '\n{"text": "The end."}')
    reader = reader_of(tokenizer, context_tokens=64)
    with pytest.raises(UserError, match=expected):
        list(reader.read(0, path, 0, is_strict=True))
    assert not caplog.records
    for _ in range(2):
        found = [(number, len(windows)) for number, windows in reader.read(0, path, 0)]
        assert found == [(1, 1), (2, 0), (3, 1)]
    (record,) = caplog.records  # once, though the row was read twice
    assert re.search(f"passed over: .*{expected}", record.getMessage())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"thinking": "", "answer": "", "finish_reason": "length"}, "was cut off"),
        ({"finish_reason": "length"}, "was cut off"),
        ({"answer": " "}, "the answer is empty"),
        ({"thinking": ""}, "has no `thinking`, which template think asks for"),
        ({"prompt": "x" * 99}, r"the prompt has \d+ tokens with its template, expected 1 to"),
    ],
)
def test_reader_takes_what_generate_writes_and_passes_over_what_teaches_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, change: dict[str, str], expected: str
) -> None:
    row = {"index": 1, "prompt": "Write!", "thinking": "Plan.", "answer": "The sea."}
    row |= {"response": "Plan.</think>", "words": 2, "finish_reason": "stop", "settings": {}}
    reader = reader_of(tokenizer, template="think", context_tokens=2000)
    if "prompt" in change:
        reader = reader_of(tokenizer, context_tokens=64)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in (row, row | change, row)))
    rows = list(reader.read(3, path, 0, is_strict=True))
    assert [len(windows) for _, windows in rows] == [1, 0, 1]
    (reason,) = reader.reasons(3)
    assert re.search(f"a.jsonl line 2.*{expected}", reason)
    assert reader.reasons(0) == []


# Rows of the stream tests: file i holds `rows[i]` rows, row r of it r % 3 windows named "i/r/k".
def named_rows(rows: list[int]) -> Any:
    def read(source: int, file: Path, start: int) -> Iterator[tuple[int, list[Window]]]:
        for row in range(start, rows[int(file.name)]):
            yield (
                row + 1,
                [
                    Window(source, f"{file}/{row}/{k}", np.zeros(2 + row % 5, np.int32), 1)
                    for k in range(row % 3)
                ],
            )

    return read


def make_source(rows: list[int], *, index: int = 0, block: int = 4, seed: int = 0) -> SourceStream:
    files = [Path(str(i)) for i in range(len(rows))]
    return SourceStream(
        index, f"source{index}", files, named_rows(rows), shuffle_windows=block, seed=seed
    )


def take(source: SourceStream, count: int) -> list[str]:
    names = []
    for _ in range(count):
        names.append(source.peek().where)
        source.advance()
    return names


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_source_gives_every_window_once_an_epoch_in_new_orders(block: int) -> None:
    rows = [7, 1, 12]
    expected = Counter(w.where for i in range(3) for _, ws in named_rows(rows)(0, Path(str(i)), 0)
                       for w in ws)  # fmt: skip
    source = make_source(rows, block=block)
    epochs = [take(source, expected.total()) for _ in range(3)]
    assert all(Counter(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert source.epoch == 2
    assert take(make_source(rows, block=block, seed=1), expected.total()) != epochs[0]


def test_source_counts_the_rows_without_a_window() -> None:
    source = make_source([7, 1, 12], block=1000)
    take(source, 6 + 0 + 12)
    assert source.num_skipped == 3 + 1 + 4
    take(source, 1)
    assert source.num_skipped == 2 * (3 + 1 + 4)


def test_source_shuffles_within_blocks_alone() -> None:
    source = make_source([30], block=6)
    rows = [int(name.split("/")[1]) for name in take(source, 30)]
    assert rows != sorted(rows)
    # 30 rows hold 30 windows; a block of six spans at most seven of them.
    assert all(abs(row - place) <= 9 for place, row in enumerate(rows))


@settings(deadline=None)
@given(
    taken=st.integers(0, 70),
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(lambda rows: max(rows) > 1),
    block=st.integers(1, 12),
)
def test_source_goes_on_where_its_state_was_taken(taken: int, rows: list[int], block: int) -> None:
    source = make_source(rows, block=block)
    take(source, taken)
    state = json.loads(json.dumps(source.state()))
    other = make_source(rows, block=block)
    other.restore(state)
    assert take(other, 40) == take(source, 40)
    assert other.state() == source.state()
    assert other.num_skipped == source.num_skipped


def test_source_refuses_files_without_text() -> None:
    with pytest.raises(UserError, match="data source 'source0' holds no text"):
        make_source([1, 0]).peek()


def test_mixture_keeps_its_shares_of_tokens() -> None:
    sources = [make_source([20], index=0), make_source([50], index=1), make_source([9], index=2)]
    stream = MixedStream(sources, [70.0, 29.0, 1.0])
    for _ in range(60):
        assert sum(w.num_tokens for w in stream.next_batch(100)) <= 100
    total = sum(source.num_tokens for source in sources)
    for source, share in zip(sources, (0.70, 0.29, 0.01), strict=True):
        assert abs(source.num_tokens - share * total) <= 2 * 5


def test_mixture_goes_on_where_its_state_was_taken() -> None:
    def make() -> MixedStream:
        return MixedStream([make_source([9], index=0), make_source([30], index=1)], [1.0, 2.0])

    stream = make()
    for _ in range(7):
        stream.next_batch(20)
    other = make()
    other.restore(json.loads(json.dumps(stream.state())))
    for _ in range(9):
        assert [w.where for w in other.next_batch(20)] == [w.where for w in stream.next_batch(20)]


def test_batch_reader_says_where_each_batch_ended_though_it_reads_ahead() -> None:
    def make() -> MixedStream:
        return MixedStream([make_source([9], index=0), make_source([30], index=1)], [1.0, 2.0])

    plain, reader = make(), BatchReader(make(), 20)
    for _ in range(9):
        expected, batch = plain.next_batch(20), reader.next()
        assert [w.where for w in batch.windows] == [w.where for w in expected]
        assert batch.state == plain.state()
        assert batch.skipped == {source.name: source.num_skipped for source in plain.sources}
        assert batch.tokens == {source.name: source.num_tokens for source in plain.sources}
    reader.close()


def test_batch_reader_raises_where_the_bad_batch_comes_up() -> None:
    def read(source: int, file: Path, start: int) -> Iterator[tuple[int, list[Window]]]:
        for row in range(start, 6):
            if row == 4:
                raise UserError("row 5 is bad")
            yield row + 1, [Window(source, "", np.zeros(11, np.int32), 1)]

    source = SourceStream(0, "a", [Path("0")], read, shuffle_windows=1, seed=0)
    reader = BatchReader(MixedStream([source], [1.0]), 20)
    assert len(reader.next().windows) == 2
    with pytest.raises(UserError, match="row 5 is bad"):
        reader.next()
    reader.close()
