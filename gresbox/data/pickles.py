"""Pickles that are data: containers, strings and numbers. Anything else in a pickle could run code and is refused."""

from __future__ import annotations

import pickle
from typing import Any, BinaryIO

__all__ = ["PICKLE_ERRORS", "load_plain_pickle"]

PICKLE_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    OverflowError,
    MemoryError,
)
"""What a broken or a hostile file can make :func:`load_plain_pickle` raise."""


class _PlainUnpickler(pickle.Unpickler):
    _allowed = frozenset({"set", "frozenset", "int", "float", "complex", "bool", "list", "dict", "tuple"})

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in self._allowed:
            return super().find_class("builtins", name)
        if (module, name) == ("collections", "OrderedDict"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, only plain containers and numbers are read")


def load_plain_pickle(file: BinaryIO) -> Any:
    """Unpickle plain containers, strings and numbers, of Python 2 as well; nothing in the file is executed.

    Args:
        file: A binary file.

    Raises:
        pickle.UnpicklingError: If the file asks for anything else. A broken file raises one of :data:`PICKLE_ERRORS`.

    Example:
        >>> import io, pickle
        >>> load_plain_pickle(io.BytesIO(pickle.dumps({"ref_id": 1, "ann_id": [-1]})))
        {'ref_id': 1, 'ann_id': [-1]}
        >>> load_plain_pickle(io.BytesIO(pickle.dumps(print)))
        Traceback (most recent call last):
        ...
        _pickle.UnpicklingError: it asks for builtins.print, only plain containers and numbers are read
    """
    return _PlainUnpickler(file, encoding="utf-8", errors="replace").load()
