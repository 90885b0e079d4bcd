"""Tokens of the text that people calibrate on: plain text, JSON lines, Parquet.

    my.txt        one text
    my.jsonl      a line for each document: {"text": …}, {"messages": [{"role": …, "content": …}]}
    my.parquet    a row for each document, with a column of these names

Conversations are written out by the tokenizer's own chat template. Between documents stands the
token that ends one, where the tokenizer has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jquant.errors import extra


def tokens_of(tokenizer: Any, path: Path) -> np.ndarray:
    """The tokens of a file's documents, one after the other, int32.

    Raises:
        ValueError: the file is not UTF-8, a document has neither text nor messages, or there are
            messages and the tokenizer has no chat template; names the line or row.
        OSError: there is no such file.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        return np.asarray(_plain(tokenizer, _text(path)), np.int32)
    records = _lines(path) if path.suffix == ".jsonl" else _rows(path)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for where, record in records:
        tokens += [*_document(tokenizer, record, f"{path}, {where}"), *end]
    return np.asarray(tokens, np.int32)


def _plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _document(tokenizer: Any, record: Any, where: str) -> list[int]:
    if isinstance(record, Mapping):
        if isinstance(record.get("text"), str):
            return _plain(tokenizer, record["text"])
        if isinstance(record.get("messages"), list):
            return _conversation(tokenizer, record["messages"], where)
        record = f"the fields {', '.join(map(str, record))}"
    raise ValueError(f'{where}: expected {{"text": …}} or {{"messages": […]}}, got {record!s:.80}')


def _conversation(tokenizer: Any, messages: list[Any], where: str) -> list[int]:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where}: messages, and the tokenizer has no chat template; pass documents as text, "
            "or name another with --tokenizer"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # whatever a template of someone's raises
        raise ValueError(f"{where}: the chat template refuses it: {error!s:.200}") from error
    return _plain(tokenizer, text)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error!s:.200}") from error
        yield f"line {number}", record


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    with extra("parquet"):
        import pyarrow
        import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = [name for name in ("text", "messages") if name in file.schema_arrow.names]
            first = 0
            for batch in file.iter_batches(columns=names or None):
                for offset, record in enumerate(batch.to_pylist()):
                    yield f"row {first + offset}", record
                first += batch.num_rows
    except pyarrow.ArrowException as error:  # also of types and codecs that it has not
        raise ValueError(f"{path} is not readable Parquet: {error!s:.200}") from error
