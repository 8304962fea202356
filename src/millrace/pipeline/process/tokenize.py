"""``tokenize``: text laid end to end, each record followed by the end token, in rows of exactly ``pack`` tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from millrace.core.errors import Nondeterministic, SpecError, TransformError
from millrace.core.spec import Tokenize, TokenizeRules
from millrace.pipeline.process.rows import UNKNOWN, Origins, ProcessContext, Rows
from millrace.pipeline.process.validate import require_columns
from millrace.pipeline.records import BATCH_BYTES, BATCH_ROWS

__all__ = ["BadText", "ByteTokens", "Encoder", "FileTokens", "TokenizeStep", "open_encoder"]

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

_GROUP_BYTES: Final = 4_000_000
_END_NAMES: Final = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "[SEP]")


@dataclass(frozen=True, slots=True)
class BadText:
    """A record the tokenizer fails on: its row, and why."""

    row: int
    reason: str


class Encoder(Protocol):
    """Text to tokens, each record followed by ``end``."""

    end: int
    pad: int

    @property
    def dtype(self) -> npt.DTypeLike:
        """``uint16`` or ``uint32``."""

    def check(self, kind: pa.DataType) -> bool:
        """Whether it reads columns of this type."""

    def encode(self, array: pa.Array) -> Iterator[Tokens | BadText]:
        """Tokens of all values, end to end, in pieces of bounded size that depend on the array alone."""


def _dtype(*ids: int) -> npt.DTypeLike:
    return np.uint16 if max(ids) < 2**16 else np.uint32


class ByteTokens:
    """The bytes of UTF-8 (or of a binary column) as tokens 0 to 255; end is 256 and pad 257 unless given."""

    def __init__(self, end: int | None, pad: int | None) -> None:
        self.end = 256 if end is None else end
        self.pad = 257 if pad is None else pad

    @property
    def dtype(self) -> npt.DTypeLike:
        """``uint16``, unless a larger id was asked for."""
        return _dtype(self.end, self.pad)

    def check(self, kind: pa.DataType) -> bool:
        """Strings and binaries."""
        return bool(pt.is_string(kind) or pt.is_binary(kind))

    def encode(self, array: pa.Array) -> Iterator[Tokens | BadText]:
        """Tokens in pieces of about 4 MB of text."""
        if not len(array):
            return
        texts = array.cast(pa.binary())
        bounds = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]
        offsets = bounds.astype(np.int64)
        row = 0
        while row < len(texts):
            last = int(np.searchsorted(offsets, offsets[row] + _GROUP_BYTES, side="right")) - 1
            if last > row:
                yield self._group(texts.slice(row, last - row), offsets[row : last + 1])
                row = last
                continue
            value = np.frombuffer(texts[row].as_buffer(), np.uint8)
            for at in range(0, len(value), _GROUP_BYTES):
                yield value[at : at + _GROUP_BYTES].astype(self.dtype)
            yield np.array([self.end], self.dtype)
            row += 1

    def _group(self, texts: pa.Array, offsets: npt.NDArray[np.int64]) -> Tokens:
        """Some whole records: joined with a byte between them where the end token goes, all at memory speed."""
        count = len(texts)
        joined = pc.binary_join(pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), texts), b"\0")[0].as_buffer()
        out = np.empty(int(offsets[-1] - offsets[0]) + count, self.dtype)
        out[:-1] = np.frombuffer(joined, np.uint8)
        out[offsets[1:] - offsets[0] + np.arange(count)] = self.end
        return out


class FileTokens:
    """A ``tokenizers`` JSON file. Adds no special tokens, cuts nothing off, pads nothing."""

    def __init__(self, tokenizer: Any, end: int, pad: int) -> None:
        self._tokenizer = tokenizer
        self.end = end
        self.pad = pad
        self._largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)

    @property
    def dtype(self) -> npt.DTypeLike:
        """``uint16`` if every id is under 65,536."""
        return _dtype(self._largest, self.end, self.pad)

    def check(self, kind: pa.DataType) -> bool:
        """Strings."""
        return bool(pt.is_string(kind))

    def encode(self, array: pa.Array) -> Iterator[Tokens | BadText]:
        """Tokens, a piece a record."""
        for row, text in enumerate(array):
            try:
                # A batch of one keeps to this thread (the worker pool has the other cores) and computes no offsets.
                ids = self._tokenizer.encode_batch_fast([text.as_py()], add_special_tokens=False)[0].ids
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a panic in the library is no Exception
                yield BadText(row, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                continue
            tokens = np.empty(len(ids) + 1, self.dtype)
            tokens[:-1] = ids
            tokens[-1] = self.end
            yield tokens


def open_encoder(rules: TokenizeRules, base: Path, where: str) -> Encoder:
    """The encoder a spec asks for.

    Args:
        rules: The spec.
        base: The pipeline file's folder.
        where: The field in the spec, for messages.

    Raises:
        SpecError: the file is missing or no tokenizer, the library isn't installed, or there is no end token.
    """
    for name, value in {"end": rules.end, "pad": rules.pad}.items():
        if value is not None and value >= 2**32:
            raise SpecError(f"{where}.{name}: {value} does not fit 32 bits")
    if rules.tokenizer == "bytes":
        return ByteTokens(rules.end, rules.pad)
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise SpecError(
            f"{where}.tokenizer: a tokenizer file needs the tokenizers library; pip install 'millrace[tokenizers]'"
        ) from error
    path = base / rules.tokenizer
    try:
        text = path.read_bytes()
    except OSError as error:
        raise SpecError(f"{where}.tokenizer: {path} can't be read: {error.strerror}") from error
    try:
        tokenizer = Tokenizer.from_str(text.decode())
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise SpecError(f"{where}.tokenizer: {path} is not a tokenizers JSON file: {why}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    end = rules.end
    if end is None:
        ids = (tokenizer.token_to_id(name) for name in _END_NAMES)
        end = next((i for i in ids if i is not None), None)
    if end is None:
        raise SpecError(
            f"{where}.end: {path} has none of the usual end tokens ({', '.join(_END_NAMES)}); give the id of one"
        )
    return FileTokens(tokenizer, end, end if rules.pad is None else rules.pad)


class TokenizeStep:
    """One ``tokenize`` transform; always the last."""

    def __init__(self, transform: Tokenize, base: Path, where: str) -> None:
        self._rules = transform.tokenize
        self._timeout_s = transform.timeout
        self._where = where
        self._encoder = open_encoder(self._rules, base, self._where)
        item = pa.field("item", pa.from_numpy_dtype(self._encoder.dtype), nullable=False)
        self.schema = pa.schema([pa.field(self._rules.into, pa.list_(item, self._rules.pack), nullable=False)])

    @property
    def label(self) -> str:
        """``tokenize: bytes``."""
        return f"tokenize: {self._rules.tokenizer}"

    def prepare(self, schema: pa.Schema | None) -> pa.Schema:
        """Check the column where the schema of what comes in is known; gives the schema of what comes out.

        Raises:
            SpecError: it isn't there or is no text.
        """
        if schema is not None:
            name = self._rules.column
            require_columns([name], schema, f"{self._where}.column")
            if not self._encoder.check(schema.field(name).type):
                raise SpecError(f"{self._where}.column: {name!r} is {schema.field(name).type}, not text")
        return self.schema

    def run(self, rows: Iterator[Rows], context: ProcessContext) -> Iterator[Rows]:
        """Rows of tokens. Their cuts depend on the text alone, not on the batches it came in.

        Raises:
            TransformError: the column isn't there or is no text.
            Nondeterministic: a sampled batch came out differently the second time.
        """
        pack = self._rules.pack
        dtype = np.dtype(self._encoder.dtype)
        most = max(1, min(BATCH_ROWS, BATCH_BYTES // (pack * dtype.itemsize))) * pack
        held = np.empty(most, dtype)
        used = 0
        for tokens in self._tokens(rows, context):
            at = 0
            while at < len(tokens):
                count = min(most - used, len(tokens) - at)
                held[used : used + count] = tokens[at : at + count]
                used += count
                at += count
                if used == most:
                    yield self._batch(held)
                    held, used = np.empty(most, dtype), 0
        if used:
            end = -(-used // pack) * pack
            held[used:end] = self._encoder.pad
            yield self._batch(held[:end])

    def _batch(self, tokens: Tokens) -> Rows:
        count = len(tokens) // self._rules.pack
        flat = pa.Array.from_buffers(self.schema.field(0).type.value_type, len(tokens), [None, pa.py_buffer(tokens)])
        array = pa.FixedSizeListArray.from_arrays(flat, type=self.schema.field(0).type)
        unknown = Origins(np.full(count, UNKNOWN, np.int32), np.full(count, UNKNOWN, np.int64))
        return Rows(pa.RecordBatch.from_arrays([array], schema=self.schema), unknown)

    def _tokens(self, rows: Iterator[Rows], context: ProcessContext) -> Iterator[Tokens]:
        for index, batch in enumerate(rows):
            try:
                self.prepare(batch.batch.schema)
            except SpecError as error:
                raise TransformError(str(error)) from error
            texts = self._without_nulls(batch, context)
            array = texts.batch.column(self._rules.column)
            first = self._guarded(array, context)
            if not context.is_sampled(index):
                pieces = first
            else:
                pieces = self._same(first, self._guarded(array, context), texts, context)
            for piece in pieces:
                if isinstance(piece, BadText):
                    context.set_aside(texts.origins, piece.row, self.label, piece.reason)
                else:
                    yield piece

    def _without_nulls(self, rows: Rows, context: ProcessContext) -> Rows:
        name = self._rules.column
        array = rows.batch.column(name)
        if not array.null_count:
            return rows
        valid = array.is_valid().to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(~valid).tolist():
            context.set_aside(rows.origins, row, "tokenize: null", f"{name} is null, so there is nothing to tokenize")
        return rows.keep(valid)

    def _guarded(self, array: pa.Array, context: ProcessContext) -> Iterator[Tokens | BadText]:
        pieces = self._encoder.encode(array)
        while True:
            with context.deadline(self.label, self._timeout_s):
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def _same(
        self,
        first: Iterator[Tokens | BadText],
        second: Iterator[Tokens | BadText],
        rows: Rows,
        context: ProcessContext,
    ) -> Iterator[Tokens | BadText]:
        """The pieces of the first run, as long as the second gives the same."""
        for a, b in zip_longest(first, second):
            if a is not None and _same_piece(a, b):
                yield a
            else:
                path, position = context.place(rows.origins, 0)
                raise Nondeterministic(
                    f"{self.label} gives different output for the same input: column {self._rules.into!r}, "
                    f"in the batch that starts at {position} of {path}"
                )


def _same_piece(a: Tokens | BadText, b: Tokens | BadText | None) -> bool:
    if isinstance(a, BadText) or isinstance(b, BadText) or b is None:
        return a is b or (isinstance(a, BadText) and a == b)
    return bool(np.array_equal(a, b))
