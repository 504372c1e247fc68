"""A web application whose users connect their accounts at an OAuth provider.

The pages are rendered by the server and need no JavaScript. A user logs in with a first account at the provider, then
sees all connections with their status, connects further accounts, calls the provider's API with a fresh token, logs in
again where the provider demands it, and disconnects an account, which revokes its tokens.

`demo.py` runs it with a provider on this machine. To run it by itself, set the variables of `Settings`, and
`TOKENSTORE_KEYS`, then start any number of processes, without an access log, which would show authorization codes:

    uvicorn --no-access-log --app-dir examples/fastapi-connections app:app

Logins and sessions that have expired stay in the database until a scheduler of yours calls `store.purge_values()`.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode, urlsplit

import httpx2
from authlib.integrations.base_client import OAuthError
from authlib.integrations.httpx_client import AsyncOAuth2Client
from fastapi import APIRouter, Depends, FastAPI, Form, HTTPException, Query, Request, Response
from fastapi.responses import RedirectResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates

from tokenstore import AuthTokenStore, ProviderRefusedError, ProviderUnavailableError, RefreshError, open_store
from tokenstore.integrations.httpx2 import StoreAuth
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.starlette import install, store_lifespan, token_store

HERE = Path(__file__).parent
PROVIDER = "example"  # the provider's name in the store
LOGIN_COOKIE, LOGIN_SECONDS = "login", 600
SESSION_COOKIE, SESSION_SECONDS = "session", 8 * 3600

# After these errors nothing has changed, and the user can only wait.
OUTAGES = (ProviderRefusedError, ProviderUnavailableError)
# A page shows one of these, and never a text that comes with the request.
NOTICES = {
    "connected": "The account is connected.",
    "disconnected": "The account is disconnected, and its tokens are revoked.",
    "expired": "This login has expired, or began in another browser. Please begin again.",
    "refused": "The account was not connected: the provider did not confirm the login.",
    "unavailable": "The provider does not answer, so nothing has changed. Please try again in a moment.",
}


@dataclass(frozen=True)
class Settings:
    """The application's settings. Each one is an environment variable of the same name in capitals."""

    public_url: str  # the application's origin, as browsers see it
    tokenstore_url: str
    client_id: str
    client_secret: str = field(repr=False)
    authorize_url: str
    token_url: str
    revocation_url: str
    api_url: str

    @classmethod
    def from_environment(cls) -> Settings:
        """Read the environment. A missing variable is an error."""
        return cls(**{setting.name: os.environ[setting.name.upper()] for setting in fields(cls)})

    def oauth_client(self) -> Any:
        """A client of Authlib for one login."""
        return AsyncOAuth2Client(
            self.client_id,
            self.client_secret,
            redirect_uri=f"{self.public_url}/callback",
            code_challenge_method="S256",
        )

    def open_store(self, http: httpx2.AsyncClient) -> AuthTokenStore:
        """The store, which refreshes and revokes at the provider."""
        refresher = OAuth2Refresher(
            self.token_url,
            self.client_id,
            self.client_secret,
            revocation_url=self.revocation_url,
            http_client=http,
        )
        return open_store(self.tokenstore_url, refreshers={PROVIDER: refresher})


def origin(url: str) -> str:
    """The scheme, host and port of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


# -- the application -------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """What the application has from its start to its end."""
    settings = Settings.from_environment()
    # One HTTP client serves all users, so it must keep no cookies.
    no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
    async with (
        httpx2.AsyncClient(timeout=10, cookies=no_cookies) as http,
        # Closed before the client: the store waits for refreshes, which need it.
        store_lifespan(lambda: settings.open_store(http), setup=True)(app) as state,
    ):
        yield {**state, "settings": settings, "http": http}


def login_url(_: Request, error: RefreshError) -> str:
    """Where a browser goes whose user has to log in at the provider."""
    return f"/login?{urlencode({'account': error.account})}"


app = FastAPI(lifespan=lifespan, openapi_url=None)
app.mount("/static", StaticFiles(directory=HERE / "static"))
install(app, login_url=login_url)
templates = Jinja2Templates(HERE / "templates")  # which escapes what it puts into HTML


@app.middleware("http")
async def protect_pages(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """No other site may frame a page, or learn its address; a page loads nothing but the style sheet."""
    response = await call_next(request)
    # Browsers apply form-action also to the redirects that follow a form.
    provider = origin(request.state.settings.authorize_url)
    response.headers["Content-Security-Policy"] = (
        f"default-src 'none'; style-src 'self'; form-action 'self' {provider}; frame-ancestors 'none'; base-uri 'none'"
    )
    response.headers["Referrer-Policy"] = "same-origin"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")
    return response


# -- what the routes need --------------------------------------------------------------------------


async def app_settings(request: Request) -> Settings:
    """The application's settings."""
    settings: Settings = request.state.settings
    return settings


async def http_client(request: Request) -> httpx2.AsyncClient:
    """One HTTP client for all users, so that connections are used again."""
    client: httpx2.AsyncClient = request.state.http
    return client


AppSettings = Annotated[Settings, Depends(app_settings)]
Http = Annotated[httpx2.AsyncClient, Depends(http_client)]
Store = Annotated[AuthTokenStore, Depends(token_store)]


async def maybe_user(request: Request, store: Store) -> str | None:
    """Who is logged in here, if anybody."""
    session = request.cookies.get(SESSION_COOKIE)
    if session is None:
        return None
    user: str | None = await store.get_value("session", digest(session))
    return user


MaybeUser = Annotated[str | None, Depends(maybe_user)]


async def logged_in_user(user: MaybeUser) -> str:
    """Who is logged in here. Others are sent to the login."""
    if user is None:
        raise HTTPException(303, headers={"Location": "/login"})
    return user


User = Annotated[str, Depends(logged_in_user)]


async def same_origin(request: Request, settings: AppSettings) -> None:
    """Refuse the forms of other sites. A browser tells the origin of every form that is posted."""
    if request.headers.get("Origin") != settings.public_url:
        raise HTTPException(403, "This form came from another site.")


def digest(secret: str) -> str:
    """What the database knows of a cookie: nobody who reads the database can make the cookie from it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def set_cookie(response: Response, settings: Settings, name: str, value: str, seconds: int) -> None:
    """Set a cookie that no script reads, and that no other site's form sends."""
    secure = settings.public_url.startswith("https:")
    response.set_cookie(name, value, max_age=seconds, httponly=True, samesite="lax", secure=secure)


def to_page(path: str, notice: str) -> RedirectResponse:
    """Redirect to a page that shows one of the notices."""
    return RedirectResponse(f"{path}?notice={notice}", 303)


pages = APIRouter()
forms = APIRouter(dependencies=[Depends(same_origin)])


# -- a login with PKCE -----------------------------------------------------------------------------


@pages.get("/login")
async def login_page(request: Request, store: Store, user: MaybeUser, account: str = "", notice: str = "") -> Response:
    """A button that begins a login; for one of the user's accounts, if the address names one."""
    context = {"user": user, "notice": NOTICES.get(notice)}
    if user is not None:
        # The page shows no text of the address but the name of an account that the user has.
        entries = [entry async for entry in store.list_tokens(provider=PROVIDER, user_id=user)]
        context["account"] = next((entry["account"] for entry in entries if entry["account"] == account), None)
    return templates.TemplateResponse(request, "login.html", context)


@forms.post("/login")
async def begin_login(
    settings: AppSettings, store: Store, user: MaybeUser, account: Annotated[str, Form()] = ""
) -> Response:
    """Send the browser to the provider."""
    state, verifier, browser = (secrets.token_urlsafe(48) for _ in range(3))
    # The cookie binds the login to this browser. Otherwise an attacker could have a victim's browser end a login of the
    # attacker, and the victim would work in the attacker's account.
    login = {"verifier": verifier, "browser": digest(browser), "user": user}
    await store.put_value("login", state, login, ttl=LOGIN_SECONDS)
    hint = {"login_hint": account} if account else {}
    async with settings.oauth_client() as client:
        url, _ = client.create_authorization_url(settings.authorize_url, state, code_verifier=verifier, **hint)
    response = RedirectResponse(url, 303)
    set_cookie(response, settings, LOGIN_COOKIE, browser, LOGIN_SECONDS)
    return response


@pages.get("/callback")
async def end_login(
    request: Request,
    settings: AppSettings,
    store: Store,
    state: Annotated[str, Query(max_length=100, pattern=r"^[A-Za-z0-9_-]+$")],
    code: str | None = None,
) -> Response:
    """The provider has sent the browser back: exchange the code for tokens, and store them."""
    login = await store.pop_value("login", state)
    browser = digest(request.cookies.get(LOGIN_COOKIE, ""))
    if login is None or not secrets.compare_digest(login["browser"], browser):
        return to_page("/login", "expired")
    home = "/login" if login["user"] is None else "/"
    if code is None:
        return to_page(home, "refused")
    try:
        async with settings.oauth_client() as client:
            tokens = await client.fetch_token(settings.token_url, code=code, code_verifier=login["verifier"])
            answer = (await client.get(settings.api_url)).raise_for_status()
    except OAuthError:
        return to_page(home, "refused")
    except httpx2.HTTPError:
        return to_page(home, "unavailable")
    # The provider says which account it is. The user's id is that of the account of the first login.
    account = answer.json()["user"]
    user = login["user"] or account
    await store.store_token_response(PROVIDER, user, tokens, account=account)
    response = to_page("/", "connected")
    response.delete_cookie(LOGIN_COOKIE)
    if login["user"] is None:
        session = secrets.token_urlsafe(48)
        await store.put_value("session", digest(session), user, ttl=SESSION_SECONDS)
        set_cookie(response, settings, SESSION_COOKIE, session, SESSION_SECONDS)
    return response


@forms.post("/logout")
async def log_out(request: Request, store: Store) -> Response:
    """End the session, here and in the database."""
    if (session := request.cookies.get(SESSION_COOKIE)) is not None:
        await store.pop_value("session", digest(session))
    response = RedirectResponse("/login", 303)
    response.delete_cookie(SESSION_COOKIE)
    return response


# -- the connections -------------------------------------------------------------------------------


@pages.get("/")
async def connections(request: Request, store: Store, user: User, notice: str = "") -> Response:
    """The settings page: the user's accounts at the provider, with their status."""
    entries = [entry async for entry in store.list_tokens(provider=PROVIDER, user_id=user)]
    context = {"user": user, "entries": entries, "notice": NOTICES.get(notice)}
    return templates.TemplateResponse(request, "connections.html", context)


@pages.get("/profile")
async def profile(
    request: Request, settings: AppSettings, store: Store, http: Http, user: User, account: str
) -> Response:
    """Call the provider's API with a fresh token.

    A browser whose user has to log in again is led to the login by the handlers of `install`. They would also answer an
    outage, with 503 and JSON; a person is better served by a page.
    """
    auth = StoreAuth(store, PROVIDER, user, account=account, origins=[origin(settings.api_url)])
    try:
        answer = (await http.get(settings.api_url, auth=auth)).raise_for_status()
    except (httpx2.HTTPError, *OUTAGES):
        return to_page("/", "unavailable")
    context = {"user": user, "account": account, "profile": answer.json()}
    return templates.TemplateResponse(request, "profile.html", context)


@forms.post("/disconnect")
async def disconnect(store: Store, user: User, account: Annotated[str, Form()]) -> Response:
    """Revoke the tokens at the provider, then delete them."""
    try:
        await store.revoke_tokens(PROVIDER, user, account=account)
    except OUTAGES:
        return to_page("/", "unavailable")
    return to_page("/", "disconnected")


app.include_router(pages)
app.include_router(forms)
