"""A small bounded cache whose keys are objects compared by identity."""

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class IdentityCache(Generic[Key, Value]):
    """The `limit` most recently used values, each kept for one object and one detail of it.

    Code objects that are equal may come from different files, so equality will not do for them.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[tuple[int, Hashable], tuple[Key, Value]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Key, detail: Hashable = None) -> Value | None:
        with self._lock:
            entry = self._entries.get((id(key), detail))
            if entry is None:
                return None
            self._entries.move_to_end((id(key), detail))
            return entry[1]

    def put(self, key: Key, value: Value, detail: Hashable = None) -> None:
        with self._lock:  # the entry keeps the key alive, so that its id is not given out again
            self._entries[id(key), detail] = (key, value)
            self._entries.move_to_end((id(key), detail))
            while len(self._entries) > self._limit:
                self._entries.popitem(last=False)

    def __len__(self) -> int:
        return len(self._entries)
