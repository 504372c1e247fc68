"""What the refreshers that take a DPoP key share."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING

from tokenstore.errors import ConfigurationError
from tokenstore.integrations._credentials import Request, with_proofs
from tokenstore.integrations._endpoint import CHECK_CLIENT
from tokenstore.tracebacks import clears_locals

if TYPE_CHECKING:
    from tokenstore.integrations.dpop import DPoP, DPoPKey
    from tokenstore.records import TokenKey
    from tokenstore.values import ValueOperations

__all__ = ["Proving"]


class Proving:
    """A refresher whose requests have a DPoP proof (RFC 9449 section 5), if it was made with ``dpop``."""

    _dpop: DPoP | None = None

    @clears_locals
    def prepare_refresh(self, values: ValueOperations, key: TokenKey, /) -> Awaitable[DPoPKey] | None:
        """Load the DPoP key of a row. The store calls this before a refresh, and passes the key with the record."""
        if self._dpop is None:
            return None
        return self._dpop.key(values, key.provider, key.user_id, account=key.account)

    def _proven(self, request: Request, key: DPoPKey | None) -> Request:
        """The request, with a proof of this key if there has to be one."""
        if self._dpop is None:
            return request
        if key is None:
            raise ConfigurationError(
                "a refresh with DPoP needs the key in the store: pass the refresher itself to load_fresh_tokens"
            )
        return with_proofs(request, key, self._dpop.token_nonces)

    @property
    def _advice(self) -> str:
        """What to do if the provider refuses a request. A proof has a time."""
        return CHECK_CLIENT if self._dpop is None else f"{CHECK_CLIENT}, and this machine's clock"
