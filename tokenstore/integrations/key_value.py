"""The store's values as a key-value store of the package ``py-key-value-aio``, which FastMCP takes for its storage."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, Final, SupportsFloat

from tokenstore.errors import InvalidInputError
from tokenstore.store import AuthTokenStore

__all__ = ["StoreKeyValue"]

_DEFAULT_COLLECTION: Final = "default_collection"  # the name in py-key-value-aio
_LONGEST_NAME: Final = 512
_HASHED: Final = "sha256:"
_MISSING: Final = object()


class StoreKeyValue:
    """The protocol ``AsyncKeyValue`` on :meth:`tokenstore.AuthTokenStore.put_value` and its neighbours.

    Every value is sealed, and bound to its collection and key. This is storage and no more: nothing here keeps two
    processes from refreshing the same token. For that, keep tokens in the store's rows, and load them with
    ``load_fresh_tokens``.

    The package ``py-key-value-aio`` is not needed: its protocol has no base class.

    A key of more than 512 bytes is stored under its SHA-256 hash. An expired value is not returned; call
    :meth:`tokenstore.AuthTokenStore.purge_values` now and then to delete it.

    The methods raise what those of the store raise, and :class:`tokenstore.InvalidInputError` for arguments that do not
    fit together.

    Args:
        store: The store.
        namespace: Stands before the name of each collection, to keep them apart from the application's own values.
    """

    def __init__(self, store: AuthTokenStore, *, namespace: str = "key-value/") -> None:
        self._store = store
        self._namespace = namespace

    async def get(self, key: str, *, collection: str | None = None) -> dict[str, Any] | None:
        """Read a value; None if there is none, or if it has expired."""
        value, _ = await self.ttl(key, collection=collection)
        return value

    async def ttl(self, key: str, *, collection: str | None = None) -> tuple[dict[str, Any] | None, float | None]:
        """Read a value, and in how many seconds it expires: None for never. ``(None, None)`` if there is none."""
        found = await self._store.get_value(self._group(collection), _name(key))
        if found is None:
            return None, None
        expires_at = found["expires_at"]
        return found["value"], None if expires_at is None else max(expires_at - time.time(), 0.0)

    async def put(
        self, key: str, value: Mapping[str, Any], *, collection: str | None = None, ttl: SupportsFloat | None = None
    ) -> None:
        """Store a value of JSON types, for ``ttl`` seconds or for ever."""
        seconds = None if ttl is None else float(ttl)
        kept = {"value": dict(value), "expires_at": None if seconds is None else time.time() + seconds}
        await self._store.put_value(self._group(collection), _name(key), kept, ttl=seconds)

    async def delete(self, key: str, *, collection: str | None = None) -> bool:
        """Delete a value; return whether there was one."""
        return await self._store.pop_value(self._group(collection), _name(key), _MISSING) is not _MISSING

    async def get_many(self, keys: Sequence[str], *, collection: str | None = None) -> list[dict[str, Any] | None]:
        """Read several values, in the order of the keys."""
        return [await self.get(key, collection=collection) for key in keys]

    async def ttl_many(
        self, keys: Sequence[str], *, collection: str | None = None
    ) -> list[tuple[dict[str, Any] | None, float | None]]:
        """Read several values and when they expire, in the order of the keys."""
        return [await self.ttl(key, collection=collection) for key in keys]

    async def put_many(
        self,
        keys: Sequence[str],
        values: Sequence[Mapping[str, Any]],
        *,
        collection: str | None = None,
        ttl: SupportsFloat | None = None,
    ) -> None:
        """Store several values, one after the other; after an error the earlier ones stay."""
        if len(keys) != len(values):
            raise InvalidInputError(f"put_many has {len(keys)} keys and {len(values)} values")
        for key, value in zip(keys, values, strict=True):
            await self.put(key, value, collection=collection, ttl=ttl)

    async def delete_many(self, keys: Sequence[str], *, collection: str | None = None) -> int:
        """Delete several values; return how many there were."""
        return sum([await self.delete(key, collection=collection) for key in keys])

    def _group(self, collection: str | None) -> str:
        return self._namespace + (_DEFAULT_COLLECTION if collection is None else collection)


def _name(key: str) -> str:
    """The value's name. A key of more bytes than a name may have is replaced by its hash."""
    data = key.encode("utf-8", "surrogatepass")
    # A key that looks like such a hash must not be the name of another key's value.
    is_name = len(data) <= _LONGEST_NAME and not key.startswith(_HASHED)
    return key if is_name else _HASHED + sha256(data).hexdigest()
