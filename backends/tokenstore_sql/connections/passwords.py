"""The option ``password``: a password beside the URL, or what returns one for each new connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from inspect import isawaitable
from typing import Any, cast

from sqlalchemy import URL

from tokenstore.errors import BackendUnavailableError, ConfigurationError, InvalidInputError, TokenStoreError
from tokenstore.native_threads import in_thread, is_coroutine_function

__all__ = ["Password", "PasswordSource", "check_password_is_given_once", "password_option", "with_password"]

PasswordSource = Callable[[], str | Awaitable[str]]
"""Returns the password of a new connection, such as a token that a cloud's identity service signs."""


class Password:
    """Where the password of a new connection comes from.

    Args:
        source: The password, or what returns it: an ``async def`` function, or a ``def`` function, which is called in a
            thread of its own because it may block.
    """

    def __init__(self, source: str | PasswordSource) -> None:
        self._source = source

    def __repr__(self) -> str:
        return "<Password ***>"

    async def current(self, timeout: float) -> str:
        """Return the password.

        Args:
            timeout: How long the callable may take, in seconds.

        Raises:
            BackendUnavailableError: The callable failed, or took too long.
            ConfigurationError: It returned no password.
        """
        if isinstance(self._source, str):
            return self._source
        failure: TokenStoreError
        try:
            async with asyncio.timeout(timeout):
                found = await _called(self._source)
        except TimeoutError:
            failure = BackendUnavailableError(f"the callable `password` returned nothing within {timeout:g} s")
        except Exception as error:  # noqa: BLE001 - foreign exceptions may contain a secret, and are named by type
            failure = BackendUnavailableError(f"the callable `password` raised {type(error).__name__}")
        else:
            if isinstance(found, str) and found:
                return found
            failure = ConfigurationError(
                f"the callable `password` must return a non-empty str, and returned {type(found).__name__}"
            )
        raise failure


async def _called(source: PasswordSource) -> object:
    found = source() if is_coroutine_function(source) else await in_thread(source)
    return await found if isawaitable(found) else found


def password_option(name: str, value: object) -> Password:
    """The parser of the option."""
    if callable(value) or (isinstance(value, str) and value):
        return Password(cast("str | PasswordSource", value))  # what a callable returns is checked later
    raise InvalidInputError(f"{name} must be a non-empty str, or a callable that returns one")


def check_password_is_given_once(url: URL) -> None:
    """Refuse a password in the URL beside the option.

    Raises:
        ConfigurationError: There is one.
    """
    if url.password is not None:
        raise ConfigurationError("password: in the URL and as an option; pass it once")


def with_password(
    connect: Callable[..., Coroutine[Any, Any, Any]], password: Password, timeout: float
) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Open connections with a password of their own.

    Args:
        connect: Opens a connection with the driver's arguments, among them ``password``.
        password: The password of each connection.
        timeout: See :meth:`Password.current`.
    """

    async def connect_with_password(*args: Any, **arguments: Any) -> Any:
        return await connect(*args, **{**arguments, "password": await password.current(timeout)})

    return connect_with_password
