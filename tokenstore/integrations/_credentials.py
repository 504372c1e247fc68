"""How a client authenticates at a token endpoint."""

from __future__ import annotations

import json
import time
import warnings
from base64 import b64encode
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args
from urllib.parse import parse_qsl, quote_plus, urlencode

from tokenstore.errors import ConfigurationError, InvalidInputError
from tokenstore.integrations._answers import Answer
from tokenstore.integrations._bodies import FORM
from tokenstore.integrations.providers import AuthMethod, Provider
from tokenstore.tracebacks import Hidden
from tokenstore.validation import plain_text

if TYPE_CHECKING:
    from joserfc.jwk import Key

    from tokenstore.integrations._dpop_key import DPoPKey
    from tokenstore.integrations._nonces import Nonces

_ASSERTION_LIFETIME: Final = 300  # seconds
# For each kind of key, the algorithms that can sign with it (RFC 7518 section 3.1, RFC 9864); the first is the default.
_ALGORITHMS: Final[Mapping[str, tuple[str, ...]]] = {
    "RSA": ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    "P-256": ("ES256",),
    "P-384": ("ES384",),
    "P-521": ("ES512",),
    "Ed25519": ("Ed25519", "EdDSA"),
}
_RSA_BITS: Final = 2048  # at least (RFC 7518 section 3.3)


class Request(NamedTuple):
    """A request that may be sent twice.

    Attributes:
        method: The HTTP method.
        url: Where it is sent.
        prepare: Makes the headers and the body, anew for each attempt: an assertion can be used once.
        is_premature: Gets each answer. Whether the endpoint refused the request before it did anything, and the next
            attempt can have what was missing: a nonce for a DPoP proof.
    """

    method: str
    url: str
    prepare: Callable[[], tuple[dict[str, str], str]]
    is_premature: Callable[[Answer], bool] = lambda _: False


def with_proofs(request: Request, key: DPoPKey, nonces: Nonces) -> Request:
    """The same request, with a DPoP proof (RFC 9449 section 5) that is made anew for each attempt.

    Args:
        request: The request.
        key: Signs the proofs.
        nonces: The nonces of authorization servers.
    """

    def prepare() -> tuple[dict[str, str], str]:
        headers, body = request.prepare()
        proof = key.proof(request.method, request.url, nonce=nonces.last(request.url))
        return {**headers, "DPoP": proof}, body

    def is_premature(answer: Answer) -> bool:
        renewed = nonces.note(request.url, answer.headers.get_list("DPoP-Nonce"))
        # The server asks for its nonce before it looks at the refresh token (RFC 9449 section 8).
        return renewed and 400 <= answer.status < 500 and answer.fields.get("error") == "use_dpop_nonce"

    return request._replace(prepare=prepare, is_premature=is_premature)


class SigningKey:
    """An application's private key, and the assertions that it signs (RFC 7523).

    Args:
        private_key: A PEM or a JWK.
        algorithm: The algorithm that signs. None: the key's default.
        headers: More headers of the assertions.

    Raises:
        ConfigurationError: The key is none, or the arguments do not go together.
    """

    def __init__(
        self, private_key: str | bytes | Mapping[str, Any], algorithm: str | None, headers: Mapping[str, str]
    ) -> None:
        key = _imported(private_key)
        self.key = Hidden(key)
        self.headers: Mapping[str, str] = {**headers, "alg": _algorithm(key, algorithm)}
        with suppress(Exception):  # the exception's text may contain the key
            _ = self.sign({}, 1.0)
            return
        raise ConfigurationError("private_key, jwt_algorithm and jwt_headers do not go together")

    def sign(self, claims: Mapping[str, Any], lifetime: float, *, ahead: float = 0.0) -> str:
        """An assertion with these claims, ``iat``, ``exp`` and ``jti``; a claim that is None is left out.

        Args:
            claims: The claims.
            lifetime: How long the assertion is valid, in seconds.
            ahead: By how many seconds this machine's clock may be ahead of the provider's.
        """
        from joserfc import jwt

        now = time.time()
        times = {"iat": int(now - ahead), "exp": int(now + lifetime), "jti": token_urlsafe(16)}
        given = {name: value for name, value in {**times, **claims}.items() if value is not None}
        return jwt.encode(dict(self.headers), given, self.key.reveal(), algorithms=[self.headers["alg"]])


class Client:
    """A client's id, and its secret or key. The arguments are those of ``OAuth2Refresher``, and one of ``Provider``.

    Attributes:
        method: The authentication method.
        has_secret: Whether there is a secret, and not a key or neither.
        secrets: The secret, in all forms in which it is sent.

    Raises:
        ConfigurationError: The arguments do not go together.
    """

    def __init__(
        self,
        client_id: str,
        client_secret: str | None,
        private_key: str | bytes | Mapping[str, Any] | None,
        method: AuthMethod,
        audience: str,
        jwt_algorithm: str | None,
        jwt_headers: Mapping[str, str],
        *,
        raw_basic: bool = False,
    ) -> None:
        if method not in get_args(AuthMethod):
            raise ConfigurationError(f"auth_method must be one of {', '.join(get_args(AuthMethod))}")
        if (client_secret is not None) is not method.startswith("client_secret_"):
            raise ConfigurationError(f"auth_method {method} and client_secret do not go together")
        if (private_key is not None) is not (method == "private_key_jwt"):
            raise ConfigurationError(f"auth_method {method} and private_key do not go together")
        if jwt_algorithm is not None and private_key is None:
            raise ConfigurationError(f"auth_method {method} and jwt_algorithm do not go together")
        self.method: AuthMethod = method
        self.has_secret = client_secret is not None
        self.secrets: Hidden[tuple[str, ...]] = Hidden(())
        self._id = checked_text("client_id", client_id)
        self._audience = audience
        self._proof: Hidden[str | Key | None] = Hidden(None)
        if client_secret is not None:
            self._proof = Hidden(checked_text("client_secret", client_secret))
            if raw_basic and method == "client_secret_basic" and ":" in client_id:
                raise ConfigurationError("client_id must not have a colon if the provider takes a raw Basic header")
            # Both parts are encoded as in a form first (RFC 6749 section 2.3.1), which Authlib leaves out.
            encode = str if raw_basic else quote_plus
            pair = f"{encode(client_id)}:{encode(client_secret)}"
            basic = b64encode(pair.encode()).decode()
            self._basic = Hidden(basic)
            self.secrets = Hidden((client_secret, quote_plus(client_secret), basic))
        if private_key is not None:
            signing = SigningKey(private_key, jwt_algorithm, jwt_headers)
            self._proof = Hidden(signing.key.reveal())
            self._jwt_headers = signing.headers

    @classmethod
    def of(
        cls,
        token_url: str,
        client_id: str,
        client_secret: str | None,
        private_key: str | bytes | Mapping[str, Any] | None,
        auth_method: AuthMethod | None,
        jwt_algorithm: str | None,
        jwt_headers: Mapping[str, str],
        provider: Provider | None,
    ) -> Client:
        """A client of a vendor's; the default of ``auth_method`` follows from what it has."""
        default: AuthMethod = "none" if client_secret is None else "client_secret_basic"
        if client_secret is not None and provider is not None:
            default = provider.auth_method
        method = auth_method or ("private_key_jwt" if private_key is not None else default)
        raw_basic = provider is not None and provider.raw_basic
        return cls(
            client_id, client_secret, private_key, method, token_url, jwt_algorithm, jwt_headers, raw_basic=raw_basic
        )

    def request(
        self,
        url: str,
        form: Mapping[str, str],
        *,
        as_json: bool = False,
        method: str = "POST",
        auth_method: AuthMethod | None = None,
    ) -> Request:
        """An authenticated request.

        Args:
            url: The endpoint.
            form: The fields of the body.
            as_json: Whether the body is a JSON object and not a form.
            method: The HTTP method.
            auth_method: The authentication method. Default: the client's own.
        """

        def prepare() -> tuple[dict[str, str], str]:
            headers, body = self._sign(url, form, auth_method or self.method)
            if as_json:
                return {**headers, "Content-Type": "application/json"}, json.dumps(dict(parse_qsl(body)))
            return headers, body

        return Request(method, url, prepare)

    def _sign(self, url: str, form: Mapping[str, str], auth_method: AuthMethod) -> tuple[dict[str, str], str]:
        from authlib.oauth2.auth import ClientAuth

        headers, body = {"Content-Type": FORM}, urlencode(form)
        if auth_method == "client_secret_basic":
            return {**headers, "Authorization": f"Basic {self._basic.reveal()}"}, body
        method: Any = auth_method
        if auth_method == "private_key_jwt":
            method = self._assertion()
            body = urlencode(
                {**form, "client_id": self._id}
            )  # RFC 7521 section 4.2: optional, but some providers require it
        _, headers, body = ClientAuth(self._id, self._proof.reveal(), method).prepare("POST", url, headers, body)
        return headers, body

    def _assertion(self) -> Any:
        """RFC 7523 section 3. A new one for each request: Authlib stores the ``jti`` in the claims that it gets."""
        from authlib.oauth2.rfc7523 import PrivateKeyJWT

        claims = {"exp": int(time.time()) + _ASSERTION_LIFETIME}
        return PrivateKeyJWT(self._audience, claims, dict(self._jwt_headers), self._jwt_headers["alg"])


def _algorithm(key: Key, requested: str | None) -> str:
    """The algorithm that signs with a key: the requested one, or the key's default."""
    kind: str = getattr(key, "curve_name", key.key_type)
    private: Any = key.private_key
    if kind == "RSA" and (bits := private.key_size) < _RSA_BITS:
        raise ConfigurationError(f"private_key has {bits} bits; an RSA key needs at least {_RSA_BITS}")
    known = _ALGORITHMS.get(kind)
    if known is None:
        raise ConfigurationError(f"private_key must be RSA or on one of the curves {', '.join(list(_ALGORITHMS)[1:])}")
    if requested is None:
        return known[0]
    if requested not in known:
        raise ConfigurationError(f"jwt_algorithm must be one of {', '.join(known)} for this private_key")
    return requested


def checked_text(name: str, value: object) -> str:
    """A non-empty ``str`` that can be encoded; ConfigurationError for anything else."""
    try:
        return plain_text(name, value)
    except InvalidInputError as error:
        problem = str(error)
    raise ConfigurationError(problem)


def checked_parameters(parameters: Mapping[str, str], taken: Collection[str]) -> dict[str, str]:
    """Check the argument ``extra_parameters``.

    Args:
        parameters: The argument.
        taken: The names that other arguments set.

    Raises:
        ConfigurationError: A name or a value is no text, or the name is taken.
    """
    checked = {checked_text("extra_parameters", k): checked_text(k, v) for k, v in parameters.items()}
    if twice := sorted(checked.keys() & set(taken)):
        raise ConfigurationError(f"extra_parameters cannot hold {', '.join(twice)}: there are arguments for them")
    return checked


def _imported(private_key: str | bytes | Mapping[str, Any]) -> Key:
    from joserfc.jwk import import_key

    data = private_key if isinstance(private_key, str | bytes) else dict(private_key)
    for kind in ("RSA", "EC", "OKP"):
        # The key has another kind or is broken; the exception's text may contain it.
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a short RSA key, which is refused with an error of its own
            key: Key = import_key(data, kind)
            if key.is_private:
                return key
    raise ConfigurationError("private_key must be an unencrypted private key (RSA, EC or Ed25519) as PEM or JWK")
