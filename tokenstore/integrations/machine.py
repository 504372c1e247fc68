"""Ready-made refreshers for tokens that a provider issues without a refresh token.

::

    refreshers = {"billing": ClientCredentials(token_url, client_id=..., client_secret=..., scope="invoices")}
    store = open_store(url, refreshers=refreshers)
    record = await store.load_fresh_tokens("billing", "service")     # issued at the first call

The first ``load_fresh_tokens`` of a row has its tokens issued, and a later one replaces them when they expire: once for
all tasks, processes and machines, as with a refresh. What is issued depends on scope and audience. So each scope and
each audience needs a row of its own: another provider name, or another account.

Needs the extra ``oauth``, as :mod:`tokenstore.integrations.oauth2` does.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Self, TypedDict, Unpack
from urllib.parse import urlencode

from tokenstore.errors import ConfigurationError, ProviderRefusedError, ReauthorizationRequiredError
from tokenstore.integrations._bodies import FORM
from tokenstore.integrations._credentials import Client, Request, SigningKey, checked_parameters, checked_text
from tokenstore.integrations._endpoint import Endpoint, checked_lifetime, require_extra
from tokenstore.integrations._proving import Proving
from tokenstore.integrations._urls import checked_hosts, checked_url
from tokenstore.integrations.providers import AuthMethod, Provider
from tokenstore.records import TokenKey, TokenRecord
from tokenstore.tracebacks import Hidden, clears_locals
from tokenstore.validation import seconds, token_key, token_text

if TYPE_CHECKING:
    import httpx
    import httpx2

    from tokenstore.integrations.dpop import DPoP, DPoPKey

__all__ = ["ClientCredentials", "GitHubAppInstallation", "IssuerOptions", "JWTBearer", "TokenExchange"]

_EXCHANGE: Final = "urn:ietf:params:oauth:grant-type:token-exchange"
_JWT_BEARER: Final = "urn:ietf:params:oauth:grant-type:jwt-bearer"
_ACCESS_TOKEN: Final = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - a name of RFC 8693 section 3
_ID_TOKEN: Final = "urn:ietf:params:oauth:token-type:id_token"  # noqa: S105 - likewise
_FIXED: Final = frozenset({"assertion", "client_id", "client_secret", "grant_type", "subject_token"})
# GitHub accepts an assertion of at most ten minutes, and advises to allow for a clock that is a minute ahead.
_ASSERTION_LIFETIME, _CLOCK_AHEAD = 540, 60
_INSTALLATION: Final = re.compile(r"[0-9]{1,20}")


class IssuerOptions(TypedDict, total=False):
    """Arguments that all classes of this module take, with the meaning that they have for ``OAuth2Refresher``."""

    timeout: float
    http_client: httpx.AsyncClient | httpx2.AsyncClient | None
    trust_env: bool
    http_hosts: Collection[str]
    default_lifetime: float | None
    max_lifetime: float | None


class _Issuer(Proving, ABC):
    """A refresher that calls one endpoint to get tokens.

    Args:
        url: The endpoint.
        secrets: What no error may show.
        provider: How the vendor differs from the RFCs. Default: not at all.
        dpop: As of ``OAuth2Refresher``.
        options: Arguments of each class.

    Attributes:
        issues: Tells the store that no refresh token is needed.
        scope: The requested scope, if the class requests one. A caller's ``scopes`` are compared with it where the
            response names none.
        audience: For whom the tokens are, if the class requests that. The store refuses to use a row's tokens that
            were issued for another audience.
        default_lifetime: As of ``OAuth2Refresher``.
        max_lifetime: As of ``OAuth2Refresher``.
    """

    issues: ClassVar[Literal[True]] = True
    _url_name: ClassVar[str] = "token_url"

    def __init__(
        self,
        url: str,
        secrets: Hidden[tuple[str, ...]],
        provider: Provider | None,
        *,
        scope: str | None = None,
        audience: str | None = None,
        timeout: float = 10.0,
        http_client: httpx.AsyncClient | httpx2.AsyncClient | None = None,
        trust_env: bool = True,
        http_hosts: Collection[str] = frozenset(),
        default_lifetime: float | None = None,
        max_lifetime: float | None = None,
        dpop: DPoP | None = None,
    ) -> None:
        self._dpop = dpop
        host, local = checked_url(self._url_name, url, checked_hosts(http_hosts))
        self.scope = scope
        self.audience = audience
        self.default_lifetime = checked_lifetime("default_lifetime", default_lifetime)
        self.max_lifetime = checked_lifetime("max_lifetime", max_lifetime)
        self._url = url
        self._endpoint = Endpoint(
            provider or Provider(name=host, token_url=url),
            secrets,
            timeout=seconds("timeout", timeout, positive=True),
            http_client=http_client,
            trust_env=trust_env and not local,
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._endpoint.provider.name}>"

    @abstractmethod
    async def __call__(self, record: TokenRecord, /) -> dict[str, Any]:
        """Have tokens issued: the token response."""

    async def _issued(self, request: Request, record: TokenRecord, advice: str) -> dict[str, Any]:
        """The response to a request for tokens. It may be sent twice: an issue that is not used does no harm."""
        label = f"the token endpoint of {self._endpoint.provider.name}"
        try:
            fields = await self._endpoint.tokens(label, request, record, repeatable=True, advice=advice)
        except ReauthorizationRequiredError as error:
            code = error.code
        else:
            return fields if self.audience is None else {"audience": self.audience, **fields}
        # `invalid_grant`: no login of a user's mends that.
        raise ProviderRefusedError(f"{label} issues no tokens ({code}): {advice}", code=code)


class ClientCredentials(_Issuer):
    """Tokens of the client itself (RFC 6749 section 4.4).

    Args:
        token_url: As of ``OAuth2Refresher``, like ``client_id``, ``client_secret``, ``private_key``, ``auth_method``,
            ``jwt_algorithm`` and ``jwt_headers``.
        client_id: The client's id.
        client_secret: The client's secret.
        private_key: The client's key instead of a secret.
        auth_method: How the client authenticates.
        scope: The requested scope, with blanks between several. Default: the provider's default.
        audience: For whom the tokens are, as some vendors want. Default: not sent.
        resource: The URL of the API that is called (RFC 8707). Default: not sent.
        extra_parameters: More fields of the request.
        jwt_algorithm: Signs the assertion of ``private_key_jwt``.
        jwt_headers: More headers of the assertion.
        provider: How the vendor differs from the RFCs. Default: not at all.
        dpop: As of ``OAuth2Refresher``: binds the tokens to a DPoP key.
        options: See :class:`IssuerOptions`.

    Raises:
        ConfigurationError: A URL, a key or a combination of arguments that cannot work.
        InvalidInputError: ``timeout`` or a lifetime is not a positive number of seconds.
        MissingDependencyError: The extra ``oauth`` is not installed.
    """

    @clears_locals
    def __init__(
        self,
        token_url: str,
        client_id: str,
        client_secret: str | None = None,
        *,
        private_key: str | bytes | Mapping[str, Any] | None = None,
        auth_method: AuthMethod | None = None,
        scope: str | None = None,
        audience: str | None = None,
        resource: str | None = None,
        extra_parameters: Mapping[str, str] = MappingProxyType({}),
        jwt_algorithm: str | None = None,
        jwt_headers: Mapping[str, str] = MappingProxyType({}),
        provider: Provider | None = None,
        dpop: DPoP | None = None,
        **options: Unpack[IssuerOptions],
    ) -> None:
        require_extra("ClientCredentials")
        self._client = Client.of(
            token_url, client_id, client_secret, private_key, auth_method, jwt_algorithm, jwt_headers, provider
        )
        super().__init__(
            token_url, self._client.secrets, provider, scope=scope, audience=audience, dpop=dpop, **options
        )
        self._form = _form(
            extra_parameters, grant_type="client_credentials", scope=scope, audience=audience, resource=resource
        )

    @clears_locals
    async def __call__(self, record: TokenRecord, dpop_key: DPoPKey | None = None, /) -> dict[str, Any]:
        """Have tokens issued: the token response, with every field that the provider sent.

        Raises:
            ProviderUnavailableError: No response in time, HTTP 429 or 5xx, or no readable response.
            ProviderRefusedError: The provider refuses the client or the request.
        """
        request = _request(self._client, self._url, self._form, self._endpoint.provider)
        return await self._issued(self._proven(request, dpop_key), record, self._advice)


class TokenExchange(_Issuer):
    """Tokens in exchange for the access token of another row, the subject (RFC 8693).

    The store loads the subject first, and refreshes it if it has expired. If the user has to log in again for the
    subject, ``load_fresh_tokens`` raises the subject's error, which names the subject's row. Nothing is wrong with this
    row then: after the login it works again.

    Args:
        token_url: As of :class:`ClientCredentials`, like the other arguments that are not listed here.
        client_id: The client's id.
        client_secret: The client's secret.
        subject_provider: The provider name of the subject. Its user is the same.
        subject_account: The account of the subject. Default: the empty name.
        subject_token_type: What is exchanged: the access token, or the ID token that came with it.
        requested_token_type: The kind of token that is wanted. Default: the provider's choice.
        private_key: The client's key instead of a secret.
        auth_method: How the client authenticates.
        scope: The requested scope.
        audience: The service for which the tokens are.
        resource: The URL of the API that is called.
        extra_parameters: More fields of the request, such as ``actor_token``.
        jwt_algorithm: Signs the assertion of ``private_key_jwt``.
        jwt_headers: More headers of the assertion.
        provider: How the vendor differs from the RFCs.
        dpop: As of ``OAuth2Refresher``: binds the tokens to a DPoP key.
        options: See :class:`IssuerOptions`.

    Raises:
        ConfigurationError: As :class:`ClientCredentials`.
        InvalidInputError: The subject's provider or account is not acceptable; and as :class:`ClientCredentials`.
        MissingDependencyError: The extra ``oauth`` is not installed.
    """

    @clears_locals
    def __init__(
        self,
        token_url: str,
        client_id: str,
        client_secret: str | None = None,
        *,
        subject_provider: str,
        subject_account: str = "",
        subject_token_type: Literal["access_token", "id_token"] = "access_token",  # noqa: S107 - a kind of token
        requested_token_type: str | None = None,
        private_key: str | bytes | Mapping[str, Any] | None = None,
        auth_method: AuthMethod | None = None,
        scope: str | None = None,
        audience: str | None = None,
        resource: str | None = None,
        extra_parameters: Mapping[str, str] = MappingProxyType({}),
        jwt_algorithm: str | None = None,
        jwt_headers: Mapping[str, str] = MappingProxyType({}),
        provider: Provider | None = None,
        dpop: DPoP | None = None,
        **options: Unpack[IssuerOptions],
    ) -> None:
        require_extra("TokenExchange")
        self._client = Client.of(
            token_url, client_id, client_secret, private_key, auth_method, jwt_algorithm, jwt_headers, provider
        )
        super().__init__(
            token_url, self._client.secrets, provider, scope=scope, audience=audience, dpop=dpop, **options
        )
        self._subject = token_key(subject_provider, "-", subject_account)
        if subject_token_type not in ("access_token", "id_token"):
            raise ConfigurationError("subject_token_type must be access_token or id_token")
        self._sends_id_token = subject_token_type == "id_token"  # noqa: S105 - a kind of token
        self._form = _form(
            extra_parameters,
            grant_type=_EXCHANGE,
            subject_token_type=_ID_TOKEN if self._sends_id_token else _ACCESS_TOKEN,
            requested_token_type=requested_token_type,
            scope=scope,
            audience=audience,
            resource=resource,
        )

    def subject_of(self, key: TokenKey, /) -> TokenKey:
        """The row whose token is exchanged for this row's: that of the same user."""
        return self._subject._replace(user_id=key.user_id)

    @clears_locals
    async def __call__(
        self,
        record: TokenRecord,  # noqa: ARG002 - every refresher gets it
        subject: TokenRecord | None = None,
        dpop_key: DPoPKey | None = None,
        /,
    ) -> dict[str, Any]:
        """Exchange the subject's token. The store passes the record of the subject.

        Raises:
            ProviderUnavailableError: No response in time, HTTP 429 or 5xx, or no readable response.
            ProviderRefusedError: The provider refuses the client, the request or the subject's token; or the subject
                has no ID token.
        """
        if subject is None:
            raise ConfigurationError("a TokenExchange needs the record of its subject: call load_fresh_tokens")
        token = subject["extra"].get("id_token") if self._sends_id_token else subject["access_token"]
        if not isinstance(token, str):
            raise ProviderRefusedError(
                "the subject has no ID token: request the scope openid at its login", code="no_id_token"
            )
        form = {**self._form, "subject_token": token}
        request = _request(self._client, self._url, form, self._endpoint.provider)
        advice = f"{self._advice}, or let the user log in again for the subject"
        return await self._issued(self._proven(request, dpop_key), subject, advice)


class JWTBearer(_Issuer):
    """Tokens in exchange for an assertion that the application signs (RFC 7523 section 2.1).

    Args:
        token_url: The token endpoint.
        issuer: The claim ``iss`` of the assertion.
        private_key: Signs the assertion: as of ``OAuth2Refresher``.
        subject: The claim ``sub``: a text, or a function that gets the record and returns it, such as
            ``lambda record: record["user_id"]``. Default: the issuer.
        audience: The claim ``aud``. Default: the token endpoint.
        scope: The requested scope, sent as a parameter (RFC 7521 section 4.1).
        claims: More claims. None leaves a claim out, also one of the claims above.
        lifetime: How long the assertion is valid, in seconds.
        client_id: Sent as a parameter, or with ``client_secret`` for authentication. Default: not sent.
        client_secret: The client's secret.
        extra_parameters: More fields of the request.
        jwt_algorithm: Signs the assertion. Default: by the key.
        jwt_headers: More headers of the assertion, such as ``kid``.
        provider: How the vendor differs from the RFCs.
        dpop: As of ``OAuth2Refresher``: binds the tokens to a DPoP key.
        options: See :class:`IssuerOptions`.

    Raises:
        ConfigurationError: As :class:`ClientCredentials`.
        InvalidInputError: As :class:`ClientCredentials`; also for ``lifetime``.
        MissingDependencyError: The extra ``oauth`` is not installed.
    """

    @clears_locals
    def __init__(
        self,
        token_url: str,
        issuer: str,
        private_key: str | bytes | Mapping[str, Any],
        *,
        subject: str | Callable[[TokenRecord], str] | None = None,
        audience: str | None = None,
        scope: str | None = None,
        claims: Mapping[str, Any] = MappingProxyType({}),
        lifetime: float = 300.0,
        client_id: str | None = None,
        client_secret: str | None = None,
        extra_parameters: Mapping[str, str] = MappingProxyType({}),
        jwt_algorithm: str | None = None,
        jwt_headers: Mapping[str, str] = MappingProxyType({}),
        provider: Provider | None = None,
        dpop: DPoP | None = None,
        **options: Unpack[IssuerOptions],
    ) -> None:
        require_extra("JWTBearer")
        self._key = SigningKey(private_key, jwt_algorithm, jwt_headers)
        if client_secret is not None and client_id is None:
            raise ConfigurationError("client_secret needs client_id")
        self._client = None
        if client_id is not None:
            self._client = Client.of(token_url, client_id, client_secret, None, None, None, {}, provider)
        secrets: Hidden[tuple[str, ...]] = Hidden(()) if self._client is None else self._client.secrets
        super().__init__(token_url, secrets, provider, scope=scope, dpop=dpop, **options)
        self._issuer = checked_text("issuer", issuer)
        self._subject = subject
        self._audience = token_url if audience is None else checked_text("audience", audience)
        self._claims = dict(claims)
        self._lifetime = seconds("lifetime", lifetime, positive=True)
        self._form = _form(extra_parameters, grant_type=_JWT_BEARER, scope=scope)

    @classmethod
    @clears_locals
    def for_google(
        cls,
        service_account: Mapping[str, Any],
        *,
        scope: str,
        subject: str | Callable[[TokenRecord], str] | None = None,
        **options: Unpack[IssuerOptions],
    ) -> Self:
        """Tokens of a Google service account.

        Args:
            service_account: The parsed JSON file of the account's key.
            scope: The requested scope, with blanks between several.
            subject: The e-mail address of a user for whom the service account acts (domain-wide delegation); a function
                as of the class. Default: the service account itself.
            options: See :class:`IssuerOptions`.

        Raises:
            ConfigurationError: The mapping is no key of a service account.
        """
        names = ("token_uri", "client_email", "private_key", "private_key_id")
        try:
            values = [service_account[name] for name in names]
        except (KeyError, TypeError):
            values = []
        if not values or not all(isinstance(value, str) for value in values):
            raise ConfigurationError(f"service_account must be a mapping with {', '.join(names)}")
        token_url, issuer, private_key, key_id = values
        # Google reads the scope in the assertion, and wants no subject for the service account itself.
        refresher = cls(
            token_url,
            issuer,
            private_key,
            subject=subject,
            claims={"scope": checked_text("scope", scope), **({} if subject is not None else {"sub": None})},
            lifetime=3600.0,
            jwt_algorithm="RS256",
            jwt_headers={"kid": key_id},
            **options,
        )
        refresher.scope = scope
        return refresher

    @clears_locals
    async def __call__(self, record: TokenRecord, dpop_key: DPoPKey | None = None, /) -> dict[str, Any]:
        """Have tokens issued: the token response, with every field that the provider sent.

        Raises:
            ProviderUnavailableError: No response in time, HTTP 429 or 5xx, or no readable response.
            ProviderRefusedError: The provider refuses the assertion, the client or the request.
        """
        subject = self._subject(record) if callable(self._subject) else self._subject
        claims = {"iss": self._issuer, "sub": subject or self._issuer, "aud": self._audience, **self._claims}

        def prepare() -> tuple[dict[str, str], str]:
            form = {**self._form, "assertion": self._key.sign(claims, self._lifetime)}
            return _request(self._client, self._url, form, self._endpoint.provider).prepare()

        advice = "check the key, the claims of the assertion, and this machine's clock"
        return await self._issued(self._proven(Request("POST", self._url, prepare), dpop_key), record, advice)


class GitHubAppInstallation(_Issuer):
    """Tokens of an installation of a GitHub App, which last an hour.

    Args:
        app_id: The app's id or client id.
        private_key: The app's key, as PEM.
        installation_id: The installation's id. Default: the row's ``user_id``, so that one refresher serves all
            installations.
        permissions: A part of the app's permissions, such as ``{"contents": "read"}``. Default: all.
        repositories: Names of repositories. Default: all to which the installation has access.
        api_url: The API of GitHub, or of a GitHub Enterprise Server: ``https://HOST/api/v3``.
        options: See :class:`IssuerOptions`.

    Raises:
        ConfigurationError: A URL or a key that cannot work.
        InvalidInputError: ``timeout`` or a lifetime is not a positive number of seconds.
        MissingDependencyError: The extra ``oauth`` is not installed.
    """

    _url_name = "api_url"

    @clears_locals
    def __init__(
        self,
        app_id: str | int,
        private_key: str | bytes,
        *,
        installation_id: str | int | None = None,
        permissions: Mapping[str, str] | None = None,
        repositories: Collection[str] | None = None,
        api_url: str = "https://api.github.com",
        **options: Unpack[IssuerOptions],
    ) -> None:
        require_extra("GitHubAppInstallation")
        if isinstance(repositories, str):
            raise ConfigurationError("repositories must be a collection of names, not one str")
        self._key = SigningKey(private_key, "RS256", {})
        self._app = checked_text("app_id", str(app_id))
        self._installation = None if installation_id is None else str(installation_id)
        if self._installation is not None and not _INSTALLATION.fullmatch(self._installation):
            raise ConfigurationError("installation_id must be a number")
        body = {"permissions": permissions, "repositories": None if repositories is None else list(repositories)}
        self._body = json.dumps({name: value for name, value in body.items() if value is not None})
        provider = Provider(
            name="GitHub Apps",
            token_url=api_url,
            read=_read_github,
            headers={"Accept": "application/vnd.github+json", "X-GitHub-Api-Version": "2022-11-28"},
        )
        super().__init__(api_url.rstrip("/"), Hidden(()), provider, **options)

    @clears_locals
    async def __call__(self, record: TokenRecord, /) -> dict[str, Any]:
        """Have tokens issued: GitHub's response, with the token as ``access_token``.

        Raises:
            ProviderUnavailableError: No response in time, HTTP 429 or 5xx, or no readable response.
            ProviderRefusedError: GitHub refuses the app or the installation, or the row names no installation.
        """
        installation = self._installation or record["user_id"]
        if not _INSTALLATION.fullmatch(installation):
            raise ProviderRefusedError(
                "the row's user_id is no number of an installation: pass installation_id", code="no_installation"
            )

        def prepare() -> tuple[dict[str, str], str]:
            assertion = self._key.sign({"iss": self._app}, _ASSERTION_LIFETIME, ahead=_CLOCK_AHEAD)
            return {"Authorization": f"Bearer {assertion}", "Content-Type": "application/json"}, self._body

        url = f"{self._url}/app/installations/{installation}/access_tokens"
        advice = "check the app's id and key, the installation, and this machine's clock"
        return await self._issued(Request("POST", url, prepare), record, advice)


def _read_github(response: Any) -> Mapping[str, Any]:
    """GitHub's response with the name of RFC 6749 for the token."""
    fields = dict(response)
    return {"access_token": token_text("token", fields.pop("token")), **fields}


def _form(extra_parameters: Mapping[str, str], **parameters: str | None) -> dict[str, str]:
    """The fields of a request, checked."""
    extra = checked_parameters(extra_parameters, _FIXED | parameters.keys())
    given = {name: checked_text(name, value) for name, value in parameters.items() if value is not None}
    return {**given, **extra}


def _request(client: Client | None, url: str, form: Mapping[str, str], provider: Provider) -> Request:
    if client is not None:
        return client.request(url, form, as_json=provider.json_request)
    return Request("POST", url, lambda: ({"Content-Type": FORM}, urlencode(form)))
