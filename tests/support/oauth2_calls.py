"""Calls of an OAuth2Refresher, with tokens and a client secret that no error may contain."""

from __future__ import annotations

import asyncio
import traceback
from typing import Any
from urllib.parse import quote_plus

import httpx
import pytest

from tokenstore import RefreshError, TokenRecord
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.providers import Rotation

ID = "my client:ü"  # has to be encoded with every client authentication
SECRET = "s3cr&t+/=% ~ö"
REFRESH, ACCESS = "ghr_theUsedOne", "gho_theOldOne"
GOOD = {"access_token": "gho_new", "expires_in": 3600, "refresh_token": "ghr_next", "token_type": "bearer", "x": [1]}
ROTATIONS: tuple[Rotation, ...] = ("strict", "grace", "none")


def record(refresh_token: str | None = REFRESH) -> TokenRecord:
    return TokenRecord(
        provider="github", user_id="u1", access_token=ACCESS, refresh_token=refresh_token, extra={}, generation=1
    )


def refresh(refresher: OAuth2Refresher, refresh_token: str | None = REFRESH) -> dict[str, Any]:
    return asyncio.run(refresher(record(refresh_token)))


def refusal(refresher: OAuth2Refresher, *, revoke: bool = False) -> RefreshError:
    """Make a call that fails, and return its error; neither the error nor a chained one contains a secret."""

    async def call() -> object:
        return await (refresher.revoke(record()) if revoke else refresher(record()))

    with pytest.raises(RefreshError) as caught:
        asyncio.run(call())
    show_no_secret(caught.value)
    return caught.value


def show_no_secret(error: BaseException) -> None:
    text = "".join(traceback.format_exception(error))
    link: BaseException | None = error
    while link is not None:
        assert not isinstance(link, httpx.HTTPError | httpx.InvalidURL)  # httpx's errors contain the request
        text += f"{link!r}{vars(link)}"
        link = link.__cause__ or link.__context__
    for secret in (REFRESH, ACCESS, SECRET, "gho_new", "ghr_next", "PRIVATE KEY"):
        assert secret not in text
        assert quote_plus(secret) not in text
