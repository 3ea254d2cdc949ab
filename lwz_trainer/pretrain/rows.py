"""Rows of text files: plain documents, prompts with answers, and conversations.

A row with the text field is a document. Else it holds `prompt` and `answer` (and maybe `thinking`),
or `messages` that end with the assistant's.

A row that nothing can be learned from is passed over: an empty text or answer, an answer that was
cut off, no thinking where the template wants it, a prompt that fills the context. So is a row of a
wrong form, except where a source begins, where it is more likely the whole source.
"""

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lwz_trainer.config.pretrain import TextDataConfig
from lwz_trainer.data.jsonl import jsonl_lines, parsed_line
from lwz_trainer.data.prompts import Prompt, prompt_language
from lwz_trainer.data.templates import Renderer
from lwz_trainer.errors import UserError
from lwz_trainer.pretrain.windows import Window, cut_document, cut_reply

__all__ = ["SUFFIXES", "RowReader"]

SUFFIXES = (".parquet", ".jsonl", ".txt")

# Rows that are tokenized in one call.
_BATCH_ROWS = 64
# Rows that are named when they are passed over, of each source; the metrics count all.
_MAX_NAMED = 5

_logger = logging.getLogger(__name__)


class _Unusable(UserError):
    """A row of the right form that nothing can be learned from."""


@dataclass(frozen=True)
class _Text:
    """One row as text; a document has no prompt, and a row that is passed over no text either."""

    row: int
    where: str
    prompt: str | None
    text: str


class RowReader:
    """Reads files of all three kinds into windows.

    Raises:
        UserError: the template cannot be used.
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
        self._reasons: dict[int, list[str]] = {}

    def reasons(self, source: int) -> list[str]:
        """Why the first rows of a source that were passed over were."""
        return self._reasons.get(source, [])

    def read(
        self, source: int, file: Path, start: int, *, is_strict: bool = False
    ) -> Iterator[tuple[int, list[Window]]]:
        """(rows passed, windows of that row), from the row after the first `start` ones on.

        A row that is passed over has no window.

        Raises:
            UserError: the file cannot be read; with `is_strict` also a row of a wrong form, naming
                the file and the line or row.
        """
        texts = self._texts(source, file, start, is_strict)
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
                    yield text.row, self._reply(source, text, next(prompt_ids), next(reply_ids))

    def _document(self, source: int, text: _Text, ids: list[int]) -> list[Window]:
        if not text.text.strip():
            return []
        ended = ids if ids[-1] == self._eos else [*ids, self._eos]
        return cut_document(source, text.where, ended, context_tokens=self._config.context_tokens)

    def _reply(
        self, source: int, text: _Text, prompt_ids: list[int], reply_ids: list[int]
    ) -> list[Window]:
        context = self._config.context_tokens
        if not 0 < len(prompt_ids) <= context:
            reason = (
                f"{text.where}: the prompt has {len(prompt_ids)} tokens with its template, "
                f"expected 1 to data.context_tokens ({context}): raise that or remove the row"
            )
            self._pass_over(source, reason)
            return []
        # A chat template writes the end of a turn itself.
        ended = reply_ids if self._is_chat else [*reply_ids, self._eos]
        learns_prompt = self._config.loss_on == "all"
        return [
            cut_reply(
                source,
                text.where,
                prompt_ids,
                ended,
                context_tokens=context,
                learns_prompt=learns_prompt,
            )
        ]

    def _pass_over(self, source: int, reason: str) -> None:
        """Logs it, if it is one of the first of the source and was not read before."""
        reasons = self._reasons.setdefault(source, [])
        if reason not in reasons and len(reasons) < _MAX_NAMED:
            reasons.append(reason)
            _logger.warning("passed over: %s", reason)

    def _tokens(self, texts: list[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]

    def _texts(self, source: int, file: Path, start: int, is_strict: bool) -> Iterator[_Text]:
        """All rows; one that is passed over as an empty document."""
        rows: Iterator[tuple[int, str, Any]]
        if file.suffix == ".txt":
            rows = _whole_file(file, start)
        elif file.suffix == ".parquet":
            rows = _parquet_rows(file, start)
        else:
            rows = jsonl_lines(file, str(file), start=start)
        for row, where, content in rows:
            try:
                text = self._text(file, row, where, content)
            except UserError as error:
                if is_strict and not isinstance(error, _Unusable):
                    raise
                self._pass_over(source, str(error))
                text = _Text(row, where, None, "")
            yield text

    def _text(self, file: Path, row: int, where: str, content: Any) -> _Text:
        """A file's bytes, a line's bytes, or a record of a parquet file."""
        if file.suffix == ".txt":
            return _Text(row, where, None, _decoded(content, where))
        record = parsed_line(content, row, str(file)) if file.suffix == ".jsonl" else content
        if not isinstance(record, dict):
            raise UserError(f"{where} holds a {type(record).__name__}; expected an object")
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
        if record.get("finish_reason") == "length":
            raise _Unusable(f"{where}: the answer was cut off (finish_reason is length)")
        if not answer.strip():
            raise _Unusable(f"{where}: the answer is empty")
        thinking = _string(record, "thinking", where) if record.get("thinking") else ""
        template = self._renderer.template
        if template is None:
            return self._chat_reply(where, prompt, thinking, answer)
        if template.kind == "think":
            if not thinking:
                raise _Unusable(
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
            raise _Unusable(
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
        if not messages[-1]["content"].strip():
            raise _Unusable(f"{where}: the last message is empty")
        before = self._rendered(where, messages[:-1], opens_reply=True)
        return self._chat_text(row, where, before, messages[:-1], messages[-1]["content"])

    def _chat_text(
        self,
        row: int,
        where: str,
        before: str,
        messages: list[dict[str, str]],
        content: str,
    ) -> _Text:
        reply = {"role": "assistant", "content": content}
        whole = self._rendered(where, [*messages, reply], opens_reply=False)
        if not whole.startswith(before):
            raise UserError(
                f"{where}: this model's chat template changes a finished reply or what stands "
                "before it, so the two cannot be told apart: use a raw template"
            )
        return _Text(row, where, before, whole.removeprefix(before))

    def _rendered(self, where: str, messages: list[dict[str, str]], *, opens_reply: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=opens_reply
            )
        except TemplateError as error:
            raise UserError(f"{where}: the chat template refuses the messages: {error}") from error
        assert isinstance(text, str), f"tokenize=False gave {type(text).__name__}"
        return text


def _tagged(thinking: str, answer: str) -> str:
    return f"<think>{thinking}</think>\n<answer>{answer}</answer>"


def _string(record: dict[str, Any], name: str, where: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be a string, got {type(value).__name__}")
    return value


def _decoded(content: bytes, where: str) -> str:
    try:
        # Line ends of all kinds become "\n", as in a file that is opened as text.
        return io.StringIO(content.decode("utf-8-sig"), newline=None).read()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 ({error}); save it as UTF-8") from error


def _whole_file(file: Path, start: int) -> Iterator[tuple[int, str, bytes]]:
    """The one row of a text file."""
    if start == 0:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}; check the path") from error
        yield 1, str(file), content


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
