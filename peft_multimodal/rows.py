"""Rows of data sets: their columns, their ids, and errors that say which row they are about."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

Row = Mapping[str, Any]
T = TypeVar("T")


def each(rows: Sequence[Any], read: Callable[[Any, str], T], id_column: str | None = None) -> list[T]:
    """`read(row, name)` of each row of a batch; an error that comes out of it knows the row (see `naming`)."""
    values = []
    for index, row in enumerate(rows):
        try:
            values.append(read(row, row_name(row, index, id_column)))
        except (TypeError, ValueError) as error:
            error.row = index  # type: ignore[union-attr]
            raise
    return values


def check_some(rows: Sequence[Any]) -> None:
    """Refuse a batch without rows, of which neither processors nor tokenizers say what is wrong."""
    if not len(rows):
        raise ValueError("The batch is empty: there is no row to read.")


def row_name(row: Any, index: int, id_column: str | None = None) -> str:
    """ "Row 3 (id 'x')", as far as the row has an id."""
    column = id_column or "id"
    return f"Row {index} ({column} {_plain(row[column])!r})" if _has(row, column) else f"Row {index}"


@contextmanager
def naming(rows: Sequence[Any], id_column: str) -> Iterator[None]:
    """Within it an error about one of these rows also gives the row's id."""
    ids = [_plain(row[id_column]) if _has(row, id_column) else None for row in rows]  # a collator may pop
    try:
        yield
    except (TypeError, ValueError) as error:
        index = getattr(error, "row", None)
        plain = type(error) in (TypeError, ValueError)  # others may not be made of a message
        if not plain or index is None or ids[index] is None or f"({id_column} {ids[index]!r})" in str(error):
            raise
        named = type(error)(f"{error} Its {id_column} is {ids[index]!r}.")
        named.row = index  # type: ignore[union-attr]
        raise named from error


def column_of(row: Row, column: str, name: str, setting: str | None = None) -> Any:
    """A row's value in a column.

    Args:
        name: Of the row.
        setting: The argument by which the column is chosen.

    Raises:
        ValueError: there is no such column; the message says which there are.
    """
    if column not in row:
        others = f"If it has another name, say so: {setting}=. " if setting else ""
        raise ValueError(
            f"{name} of the batch has no column {column!r} but {sorted(row)}. {others}If the data set has it, Trainer "
            "dropped it, as it drops what the model's forward doesn't name: set remove_unused_columns=False."
        )
    return row[column]


def hash_ids(ids: Iterable[Any]) -> np.ndarray:
    """int64 keys of ids: integers stay what they are, strings get 64 bits of BLAKE2b; others are a TypeError."""
    return np.fromiter((key_of(i) for i in ids), np.int64)


def key_of(value: Any) -> int:
    """The int64 key of one id: an integer of Python, NumPy or torch, or a string."""
    plain = _plain(value)
    if isinstance(plain, str):
        return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little", signed=True)
    if isinstance(plain, int) and not isinstance(plain, bool) and -(2**63) <= plain < 2**63:
        return plain
    raise TypeError(f"Ids are strings or 64-bit integers, got {value!r} ({type(value).__name__}).")


def _plain(value: Any) -> Any:
    """Numbers of NumPy and torch as Python's own."""
    if isinstance(value, np.generic) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0):
        return value.item()
    return value


def _has(row: Any, column: str) -> bool:
    return isinstance(row, Mapping) and column in row


def ids_of(rows: Sequence[Row], column: str) -> Tensor:
    """int64 (B,) keys of a column of ids; an error names the row that has none, or no integer and no string."""

    def read(row: Row, name: str) -> int:
        try:
            return key_of(column_of(row, column, name, "id_column"))
        except TypeError as error:
            raise TypeError(f"{name}: column {column!r} holds no id. {error}") from None

    return torch.tensor(each(rows, read), dtype=torch.long)


def streams(dataset: Any) -> bool:
    """Whether a data set can only be read from its beginning."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")
