"""Rows of text files: plain documents, prompts with answers, and conversations.

A row with the text field is a document. Else it holds `prompt` and `answer` (and maybe `thinking`),
or `messages` that end with the assistant's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lwz_trainer.config.pretrain import TextDataConfig
from lwz_trainer.data.jsonl import jsonl_rows
from lwz_trainer.data.prompts import Prompt, prompt_language
from lwz_trainer.data.templates import Renderer
from lwz_trainer.errors import UserError
from lwz_trainer.pretrain.windows import Window, cut_document, cut_reply

__all__ = ["SUFFIXES", "RowReader"]

SUFFIXES = (".parquet", ".jsonl", ".txt")

# Rows that are tokenized in one call.
_BATCH_ROWS = 64


@dataclass(frozen=True)
class _Text:
    """One row as text; a document has no prompt."""

    row: int
    where: str
    prompt: str | None
    text: str


class RowReader:
    """Reads files of all three kinds into windows.

    Raises:
        UserError: naming the file and the line or row; or the template cannot be used.
    """

    def __init__(self, config: TextDataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._renderer = Renderer(
            config.template, chat_opened=config.chat_opened, chat_system=config.chat_system
        )
        self._is_chat = self._renderer.template is None
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no eos_token, which ends every text: set one in "
                "tokenizer_config.json"
            )
        self._eos: int = tokenizer.eos_token_id

    def read(self, source: int, file: Path, start: int) -> Iterator[tuple[int, list[Window]]]:
        """(rows passed, windows of that row), from the row after the first `start` ones on."""
        texts = self._texts(file, start)
        while batch := list(islice(texts, _BATCH_ROWS)):
            documents = [text for text in batch if text.prompt is None]
            pairs = [text for text in batch if text.prompt is not None]
            whole_ids = iter(self._tokens([text.text for text in documents], special=True))
            prompt_ids = iter(
                self._tokens([text.prompt or "" for text in pairs], special=not self._is_chat)
            )
            reply_ids = iter(self._tokens([text.text for text in pairs], special=False))
            for text in batch:
                if text.prompt is None:
                    yield text.row, self._document(source, text, next(whole_ids))
                else:
                    yield text.row, [self._reply(source, text, next(prompt_ids), next(reply_ids))]

    def _document(self, source: int, text: _Text, ids: list[int]) -> list[Window]:
        if not text.text.strip():
            return []
        ended = ids if ids[-1] == self._eos else [*ids, self._eos]
        return cut_document(source, text.where, ended, context_tokens=self._config.context_tokens)

    def _reply(
        self, source: int, text: _Text, prompt_ids: list[int], reply_ids: list[int]
    ) -> Window:
        # A chat template writes the end of a turn itself.
        ended = reply_ids if self._is_chat else [*reply_ids, self._eos]
        return cut_reply(
            source,
            text.where,
            prompt_ids,
            ended,
            context_tokens=self._config.context_tokens,
            learns_prompt=self._config.loss_on == "all",
        )

    def _tokens(self, texts: list[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]

    def _texts(self, file: Path, start: int) -> Iterator[_Text]:
        if file.suffix == ".txt":
            if start == 0:
                yield _Text(1, str(file), None, _read_text(file))
            return
        rows = (
            _parquet_rows(file, start)
            if file.suffix == ".parquet"
            else jsonl_rows(file, str(file), start=start)
        )
        for row, where, record in rows:
            if not isinstance(record, dict):
                raise UserError(f"{where} holds a {type(record).__name__}; expected an object")
            yield self._text(row, where, record)

    def _text(self, row: int, where: str, record: dict[str, Any]) -> _Text:
        field = self._config.text_field
        if record.get(field) is not None:
            return _Text(row, where, None, _string(record, field, where))
        if record.get("messages") is not None:
            return self._conversation(row, where, record["messages"])
        if record.get("prompt") is None or record.get("answer") is None:
            raise UserError(
                f"{where} has neither `{field}`, nor `prompt` and `answer`, nor `messages`; its "
                f"fields are: {', '.join(map(str, record)) or 'none'}"
            )
        question = _string(record, "prompt", where)
        prompt = Prompt(question, None, prompt_language(question), row)
        answer = _string(record, "answer", where)
        thinking = _string(record, "thinking", where) if record.get("thinking") else ""
        template = self._renderer.template
        if template is None:
            return self._chat_reply(where, prompt, thinking, answer)
        if template.kind == "think":
            if not thinking:
                raise UserError(
                    f"{where} has no `thinking`, which template {self._config.template} asks for: "
                    "add it, or use data.template=direct"
                )
            reply = _tagged(thinking, answer)
        else:  # a reply without thinking, whatever the row holds
            reply = f"<answer>{answer}</answer>"
        text = template.render(prompt)
        # Raw templates end with a colon: the reply starts after a space, as in their examples.
        gap = "" if template.opened or text[-1:].isspace() else " "
        return _Text(row, where, text, gap + reply.removeprefix(template.opened))

    def _chat_reply(self, where: str, prompt: Prompt, thinking: str, answer: str) -> _Text:
        """Prompt and answer in the model's own chat template."""
        opened = self._config.chat_opened
        if opened == "<think>" and not thinking:
            raise UserError(
                f"{where} has no `thinking`, which data.chat_opened <think> asks for: add it, or "
                "use data.chat_opened=<answer>"
            )
        if opened == "<answer>":
            content = f"<answer>{answer}</answer>"
        elif thinking:
            content = _tagged(thinking, answer)
        else:
            content = answer
        before = self._renderer.text(prompt, self._tokenizer)
        messages = [{"role": "user", "content": prompt.prompt}]
        if self._config.chat_system:
            messages.insert(0, {"role": "system", "content": self._config.chat_system})
        return self._chat_text(prompt.row, where, before, messages, content)

    def _conversation(self, row: int, where: str, messages: Any) -> _Text:
        """The last turn is the reply; all before it is the prompt."""
        is_list = isinstance(messages, list) and len(messages) >= 2
        if not is_list or not all(
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
            for turn in messages
        ):
            raise UserError(
                f"{where}: messages must be a list of at least two objects with role and content"
            )
        if messages[-1]["role"] != "assistant":
            raise UserError(
                f"{where}: the last message must be the assistant's, got '{messages[-1]['role']}'"
            )
        if not self._is_chat:
            raise UserError(
                f"{where} holds messages, which need data.template=chat, got "
                f"'{self._config.template}'"
            )
        before = self._tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        assert isinstance(before, str)
        return self._chat_text(row, where, before, messages[:-1], messages[-1]["content"])

    def _chat_text(
        self,
        row: int,
        where: str,
        before: str,
        messages: list[dict[str, str]],
        content: str,
    ) -> _Text:
        whole = self._tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": content}], tokenize=False
        )
        assert isinstance(whole, str)
        if not whole.startswith(before):
            raise UserError(
                f"{where}: this model's chat template changes a finished reply or what stands "
                "before it, so the two cannot be told apart: use a raw template"
            )
        return _Text(row, where, before, whole.removeprefix(before))


def _tagged(thinking: str, answer: str) -> str:
    return f"<think>{thinking}</think>\n<answer>{answer}</answer>"


def _string(record: dict[str, Any], name: str, where: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be a string, got {type(value).__name__}")
    return value


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; check the path") from error


def _parquet_rows(file: Path, start: int) -> Iterator[tuple[int, str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            number = 0
            for group in range(parquet.num_row_groups):
                size = parquet.metadata.row_group(group).num_rows
                if number + size <= start:
                    number += size
                    continue
                for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group]):
                    for record in batch.to_pylist():
                        number += 1
                        if number > start:
                            yield number, f"{file} row {number}", record
    except (pyarrow.ArrowInvalid, OSError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{file} is not a readable parquet file ({problem})") from error
