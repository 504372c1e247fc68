"""What a strict provider answers: its endpoints, clients and settings, without HTTP and without faults."""

from __future__ import annotations

import hashlib
import hmac
import re
import threading
from base64 import urlsafe_b64encode
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from tokenstore.testing.provider.dpop import NonceNeeded, ProofRefused, Proofs, is_thumbprint
from tokenstore.testing.provider.grants import Code, Grant, Grants
from tokenstore.testing.provider.messages import HttpError, Reply, Request, credentials, parameters, required
from tokenstore.testing.provider.stats import Counters, ProviderStats

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

__all__ = ["AuthorizationServer", "bearer_challenge"]

_REALM = 'realm="tokenstore.testing"'
_ALL_SCOPES = "read write"
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[!-\"$-~]+")  # without a fragment (RFC 6749 section 3.1.2)
_CHALLENGE = re.compile(r"[A-Za-z0-9_-]{43}")
_VERIFIER = re.compile(r"[A-Za-z0-9._~-]{43,128}")


class AuthorizationServer:
    """The endpoints of :class:`tokenstore.testing.provider.StrictRotatingProvider`, which describes the arguments."""

    def __init__(
        self,
        *,
        client_id: str,
        client_secret: str,
        access_token_lifetime: float,
        refresh_token_lifetime: float | None,
        code_lifetime: float,
        redirect_uris: Collection[str],
        rotate: bool,
        grace: float,
        clock: Callable[[], float],
    ) -> None:
        self.client_id = client_id
        self.client_secret = client_secret
        self.access_token_lifetime = access_token_lifetime
        self.refresh_token_lifetime = refresh_token_lifetime
        self.code_lifetime = code_lifetime
        self.redirect_uris = redirect_uris
        self.rotate = rotate
        self.grace = grace
        self.user = "user-123"
        """Who logs in through ``/authorize``, unless the request has a ``login_hint``."""
        self.consents = True
        """While False, users refuse at ``/authorize``: it redirects with the error ``access_denied``."""
        self.demands_nonces = False
        """While True, each DPoP proof needs the nonce of the server that it is for (RFC 9449 sections 8 and 9)."""
        self.binds_access_tokens = True
        """While False, a DPoP proof binds the refresh token alone, and the ``token_type`` is ``Bearer``."""
        # Guards the attributes below: the event loop's thread handles requests with them, callers read and set them.
        self._state = threading.Condition()
        self._grants = Grants(clock)
        self._token_proofs, self._resource_proofs = Proofs(clock), Proofs(clock)
        self._counters = Counters()

    # -- called by the test ----------------------------------------------------------------------

    def new_grant(self, user: str, *, scope: str = _ALL_SCOPES, dpop_jkt: str | None = None) -> dict[str, Any]:
        """Log ``user`` in and return the token response of the new grant (RFC 6749 section 5.1).

        Args:
            user: Who logs in.
            scope: What the user grants.
            dpop_jkt: The thumbprint of the DPoP key that the tokens are bound to. Default: none.
        """
        with self._state:
            grant = Grant(user=user, scope=scope, dpop_jkt=dpop_jkt)
            self._issue(grant, scope, rotate=True)
            return self._grants.response(grant, with_refresh=True)

    def expire_access_tokens(self, user: str) -> None:
        """Let every access token that ``user`` has now expire, although its stated lifetime is longer."""
        with self._state:
            self._grants.expire_access_tokens(user)

    def revoke_user(self, user: str) -> None:
        """Revoke all grants of ``user``, as when the user withdraws the consent at the provider's own page."""
        with self._state:
            self._counters.revoked_grants += self._grants.revoke_user(user)

    def renew_nonces(self) -> None:
        """Let the nonces of the token endpoint and of the API be others from now on."""
        with self._state:
            self._token_proofs.renew_nonce()
            self._resource_proofs.renew_nonce()

    def check_access(self, method: str, url: str, headers: Mapping[str, str]) -> Reply:
        """What an API that takes this provider's access tokens answers to a request: for an API of your own.

        Args:
            method: The request's method.
            url: Its URL without the query, which a DPoP proof has to name.
            headers: Its headers; the names are in lower case.

        Returns:
            200 and the user with the scope, or 401 with a challenge.
        """
        with self._state:
            try:
                return self._check_access(method, url, headers)
            except HttpError as error:
                return error.reply

    def stats(self) -> ProviderStats:
        """Return a consistent snapshot of the counters."""
        with self._state:
            return self._counters.snapshot()

    # -- request handlers, which run with the lock held ------------------------------------------

    def _handler(self, request: Request) -> Callable[[Request], Reply]:
        """The endpoint that a request is for. Raises HttpError if there is none."""
        endpoints = {
            "/authorize": ("GET", self._authorize),
            "/token": ("POST", self._token),
            "/revoke": ("POST", self._revoke),
            "/resource": ("GET", self._resource),
            "/stats": ("GET", lambda _: Reply(200, asdict(self.stats()))),
        }
        if request.path not in endpoints:
            raise HttpError(404, "invalid_request", "no such endpoint")
        method, handler = endpoints[request.path]
        if request.method != method:
            raise HttpError(405, "invalid_request", f"use {method}", {"Allow": method})
        return handler

    def _authorize(self, request: Request) -> Reply:
        """Redirect with a code, or with an error. Without a redirect URI to trust: 400 (RFC 6749 section 4.1.2.1)."""
        query = parameters(request.query)
        if required(query, "client_id") != self.client_id:
            raise HttpError(400, "invalid_request", "unknown client_id")
        target = required(query, "redirect_uri")
        if not _URI.fullmatch(target) or (self.redirect_uris and target not in self.redirect_uris):
            raise HttpError(400, "invalid_request", "this redirect_uri is not registered")
        try:
            answer = {"code": self._new_code(query, target)}
        except HttpError as error:
            answer = error.fields
        if "state" in query:
            answer = {**answer, "state": query["state"]}
        location = f"{target}{'&' if '?' in target else '?'}{urlencode(answer)}"
        return Reply(302, headers={"Location": location})

    def _new_code(self, query: Mapping[str, str], redirect_uri: str) -> str:
        if required(query, "response_type") != "code":
            raise HttpError(400, "unsupported_response_type", "use code")
        challenge = required(query, "code_challenge")
        # Without a method, the challenge is "plain" (RFC 7636 section 4.3).
        if query.get("code_challenge_method", "plain") != "S256":
            raise HttpError(400, "invalid_request", "the code_challenge_method must be S256")
        if not _CHALLENGE.fullmatch(challenge):
            raise HttpError(400, "invalid_request", "the code_challenge is no SHA-256 digest in base64url")
        if not self.consents:
            raise HttpError(400, "access_denied", "the user refused")
        dpop_jkt = query.get("dpop_jkt")  # RFC 9449 section 10
        if dpop_jkt is not None and not is_thumbprint(dpop_jkt):
            raise HttpError(400, "invalid_request", "the dpop_jkt is no SHA-256 digest in base64url")
        grant = Grant(query.get("login_hint", self.user), query.get("scope", _ALL_SCOPES), dpop_jkt=dpop_jkt)
        expires = self._grants.clock() + self.code_lifetime
        return self._grants.add_code(Code(grant, redirect_uri, challenge, expires))

    def _token(self, request: Request) -> Reply:
        form, jkt = self._authenticated_form(request), self._proven_key(request)
        match required(form, "grant_type"):
            case "authorization_code":
                reply = self._redeem(form, jkt)
            case "client_credentials":
                reply = self._issue_alone(self.client_id, form, jkt)
            case "urn:ietf:params:oauth:grant-type:token-exchange":
                reply = self._exchange(form, jkt)
            case "refresh_token":
                reply = self._refresh(form, jkt)
            case _:
                raise HttpError(400, "unsupported_grant_type", "this grant_type is not supported")
        return reply if jkt is None else self._with_nonce(reply, self._token_proofs)

    def _proven_key(self, request: Request) -> str | None:
        """The thumbprint of the key of a token request's DPoP proof; None: it has no proof."""
        proof = request.headers.get("dpop")
        if proof is None:
            return None
        url, proofs = f"http://{request.headers.get('host')}{request.path}", self._token_proofs
        try:
            return proofs.check(proof, request.method, url, demands_nonce=self.demands_nonces)
        except ProofRefused as error:
            raise HttpError(400, "invalid_dpop_proof", str(error)) from None
        except NonceNeeded:
            raise HttpError(400, "use_dpop_nonce", "use this nonce", {"DPoP-Nonce": proofs.nonce}) from None

    def _with_nonce(self, reply: Reply, proofs: Proofs) -> Reply:
        return replace(reply, headers={**reply.headers, "DPoP-Nonce": proofs.nonce}) if self.demands_nonces else reply

    def _redeem(self, form: Mapping[str, str], jkt: str | None) -> Reply:
        """Exchange a code for tokens. The first request with a code consumes it, also one that is refused."""
        redirect_uri, verifier = required(form, "redirect_uri"), required(form, "code_verifier")
        code = self._grants.find_code(required(form, "code"))
        if code is None:
            raise HttpError(400, "invalid_grant", "unknown code")
        grant = code.grant
        if code.used:  # RFC 6749 section 4.1.2
            self._counters.reuses += 1
            self._revoke_grant(grant)
            raise HttpError(400, "invalid_grant", "code already used: grant revoked")
        code.used = True
        if grant.revoked or self._grants.clock() >= code.expires:
            raise HttpError(400, "invalid_grant", "the code has expired, or the user has withdrawn the consent")
        if redirect_uri != code.redirect_uri:
            raise HttpError(400, "invalid_grant", "not the redirect_uri of the authorization request")
        if not _VERIFIER.fullmatch(verifier) or not hmac.compare_digest(_challenge(verifier), code.challenge):
            raise HttpError(400, "invalid_grant", "not the code_verifier of the authorization request")
        self._bind(grant, jkt)
        self._issue(grant, grant.scope, rotate=True)
        return Reply(200, self._grants.response(grant, with_refresh=True))

    def _issue_alone(self, user: str, form: Mapping[str, str], jkt: str | None, **fields: str) -> Reply:
        """Issue an access token without a refresh token."""
        grant = Grant(user, form.get("scope", _ALL_SCOPES), dpop_jkt=jkt)
        self._issue(grant, grant.scope, rotate=False)
        self._counters.issues += 1
        return Reply(200, {**self._grants.response(grant, with_refresh=False), **fields})

    def _exchange(self, form: Mapping[str, str], jkt: str | None) -> Reply:
        """Exchange a valid access token for another one of the same user (RFC 8693)."""
        access_token = "urn:ietf:params:oauth:token-type:access_token"
        if required(form, "subject_token_type") != access_token:
            raise HttpError(400, "invalid_request", "the subject_token_type is not supported")
        subject = self._grants.find_valid_access_token(required(form, "subject_token"))
        if subject is None:
            raise HttpError(400, "invalid_grant", "the subject_token is unknown, expired or revoked")
        return self._issue_alone(subject.user, form, jkt, issued_token_type=access_token)

    def _refresh(self, form: Mapping[str, str], jkt: str | None) -> Reply:
        token = required(form, "refresh_token")
        grant = self._grants.find_refresh_token(token)
        if grant is None:
            raise HttpError(400, "invalid_grant", "unknown refresh token")
        self._bind(grant, jkt)  # before the token is consumed: a stolen one must not end the grant
        scope = form.get("scope", grant.scope)
        if not set(scope.split()) <= set(grant.scope.split()):  # RFC 6749 section 6
            raise HttpError(400, "invalid_scope", "the scope exceeds what the user granted")
        now = self._grants.clock()
        if token != grant.refresh:
            # No grace for older refresh tokens: the ones that replaced them are used.
            in_grace = token == grant.previous and now - grant.rotated_at < self.grace
            if grant.revoked or not in_grace:
                self._counters.reuses += 1
                self._revoke_grant(grant)
                raise HttpError(400, "invalid_grant", "refresh token already used: grant revoked")
            self._counters.replays += 1
            return Reply(200, self._grants.response(grant, with_refresh=True))
        if grant.revoked:
            raise HttpError(400, "invalid_grant", "the grant is revoked")
        if grant.refresh_expires is not None and now >= grant.refresh_expires:
            raise HttpError(400, "invalid_grant", "refresh token expired")
        rotate = self.rotate
        self._issue(grant, scope, rotate=rotate)
        self._counters.refreshes[grant.user] += 1
        return Reply(200, self._grants.response(grant, with_refresh=rotate))

    def _revoke(self, request: Request) -> Reply:
        """Revoke a token (RFC 7009). A refresh token is revoked with its grant, an access token alone."""
        token = required(self._authenticated_form(request), "token")
        self._grants.end_access_token(token)
        if grant := self._grants.find_refresh_token(token):
            self._revoke_grant(grant)
        return Reply(200)  # also for an unknown token (RFC 7009 section 2.2)

    def _resource(self, request: Request) -> Reply:
        url = f"http://{request.headers.get('host')}{request.path}"
        return self._check_access(request.method, url, request.headers)

    def _check_access(self, method: str, url: str, headers: Mapping[str, str]) -> Reply:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        scheme, token = scheme.lower(), token.strip()
        if scheme not in ("bearer", "dpop"):  # without a token, no challenge has an error (RFC 6750 section 3.1)
            challenge = {"WWW-Authenticate": f"Bearer {_REALM}"}
            raise HttpError(401, "invalid_token", "an access token is required", challenge)
        grant = self._grants.find_valid_access_token(token)
        if scheme == "bearer":
            # A bound token must not work without its key (RFC 9449 section 7.2).
            if grant is None or grant.access_jkt is not None:
                raise bearer_challenge("the token is unknown, expired or revoked, or bound to a DPoP key")
            return Reply(200, {"user": grant.user, "scope": grant.access_scope})
        proofs = self._resource_proofs
        try:
            jkt = proofs.check(
                headers.get("dpop", ""), method, url, access_token=token, demands_nonce=self.demands_nonces
            )
        except ProofRefused as error:
            raise _dpop_challenge("invalid_dpop_proof", str(error)) from None
        except NonceNeeded:
            raise _dpop_challenge("use_dpop_nonce", "use this nonce", {"DPoP-Nonce": proofs.nonce}) from None
        if grant is None or grant.access_jkt != jkt:
            raise _dpop_challenge("invalid_token", "the token is unknown, expired, revoked, or of another key")
        return self._with_nonce(Reply(200, {"user": grant.user, "scope": grant.access_scope}), proofs)

    def _authenticated_form(self, request: Request) -> dict[str, str]:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/x-www-form-urlencoded":
            raise HttpError(415, "invalid_request", "use application/x-www-form-urlencoded")
        form = parameters(request.body)
        try:
            given = credentials(request.headers.get("authorization"), form)
        except ValueError:
            given = "", ""
        known = self.client_id, self.client_secret
        same = [hmac.compare_digest(a.encode(), b.encode()) for a, b in zip(given, known, strict=True)]
        if not all(same):
            self._counters.rejected_clients += 1
            challenge = {"WWW-Authenticate": f"Basic {_REALM}"}
            raise HttpError(401, "invalid_client", "client authentication failed", challenge)
        return form

    def _bind(self, grant: Grant, jkt: str | None) -> None:
        """Bind a grant to the key of a proof. Its tokens then work with no other key (RFC 9449 section 5)."""
        if grant.dpop_jkt not in (None, jkt):
            raise HttpError(400, "invalid_grant", "the grant is bound to another DPoP key")
        grant.dpop_jkt = jkt

    def _issue(self, grant: Grant, scope: str, *, rotate: bool) -> None:
        grant.access_jkt = grant.dpop_jkt if self.binds_access_tokens else None
        self._grants.issue_access_token(grant, scope, self.access_token_lifetime)
        if rotate:
            self._grants.issue_refresh_token(grant, self.refresh_token_lifetime)

    def _revoke_grant(self, grant: Grant) -> None:
        self._counters.revoked_grants += self._grants.revoke(grant)


def bearer_challenge(description: str) -> HttpError:
    """The 401 of a protected resource for a token that it refuses (RFC 6750 section 3)."""
    challenge = {"WWW-Authenticate": f'Bearer {_REALM}, error="invalid_token"'}
    return HttpError(401, "invalid_token", description, challenge)


def _dpop_challenge(error: str, description: str, headers: Mapping[str, str] | None = None) -> HttpError:
    """The 401 of a protected resource for a request with the scheme DPoP (RFC 9449 section 7.1)."""
    challenge = f'DPoP {_REALM}, error="{error}", algs="ES256"'
    return HttpError(401, error, description, {"WWW-Authenticate": challenge, **(headers or {})})


def _challenge(verifier: str) -> str:
    """The challenge of a code verifier by the method S256 (RFC 7636 section 4.2)."""
    return urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")
