"""A Flask extension: the store in ``def`` and ``async def`` views, and error handlers; needs the extra ``flask``.

::

    tokens = TokenStore(refreshers={"github": github}, login_url="/connect/{provider}")

    def create_app():
        app = Flask(__name__)
        app.config["TOKENSTORE_URL"] = os.environ["TOKENSTORE_URL"]
        tokens.init_app(app)
        return app

    @blueprint.get("/repositories")
    def repositories():
        record = tokens.store.load_fresh_tokens("github", session["user"], missing="raise")
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from tokenstore import sync
from tokenstore.errors import ConfigurationError, MissingDependencyError, RefreshError, TokenStoreError
from tokenstore.integrations._loop_stores import LoopStores
from tokenstore.integrations._settings import SETTINGS, StoreSettings, login_place, read_settings
from tokenstore.integrations._web import (
    LOGIN_ERRORS,
    OUTAGE_ERRORS,
    Answer,
    login_answer,
    outage_answer,
    shows_a_page,
)
from tokenstore.store import AuthTokenStore
from tokenstore.tracebacks import clears_locals

try:
    from flask import Response, current_app, json, request
except ImportError:
    raise MissingDependencyError('tokenstore.integrations.flask needs Flask: pip install "tokenstore[flask]"') from None

if TYPE_CHECKING:
    from flask import Flask

    from tokenstore.refresh.attempt import Refresh

__all__ = ["TokenStore"]

_EXTENSION: Final = "tokenstore"
_PREFIX: Final = "TOKENSTORE_"


class TokenStore:
    """The extension. One object serves any number of applications, each with its own configuration.

    The configuration of an application has ``TOKENSTORE_URL``, the URL of the database, and may have
    ``TOKENSTORE_KEYS`` (entries ``name:base64url``, or a :class:`~tokenstore.Keyring`) or ``TOKENSTORE_KEYS_FILE`` (a
    path), ``TOKENSTORE_NAMESPACE``, ``TOKENSTORE_REFRESHERS`` (a mapping, or its dotted path) and
    ``TOKENSTORE_OPTIONS`` (a dict of other keyword arguments of :func:`tokenstore.open_store`). Without a setting for
    the keys, the environment variable ``TOKENSTORE_KEYS`` has them.

    If a view has no fresh token, its error becomes a response. An application that registers an error handler of its
    own, after ``init_app`` or in a blueprint, gets the error instead.

    - The user has to log in (:class:`~tokenstore.ReauthorizationRequiredError`,
      :class:`~tokenstore.TokensMissingError`, :class:`~tokenstore.InsufficientScopeError`): 303 to ``login_url`` if the
      request is one of a browser for a page, else 401.
    - The provider or the database cannot serve now: 503 with ``Retry-After``.

    Args:
        app: The application; default: call :meth:`init_app`.
        refreshers: For each provider a refresher; default: those of the configuration.
        login_url: Where the user logs in at the provider: a path or URL in which ``{provider}`` is replaced by the
            provider's name, or a function of the error, which may use ``url_for`` and ``request``. Default: the
            response is always 401.

    Raises:
        ConfigurationError: With ``app``: its configuration is not acceptable.
    """

    @clears_locals
    def __init__(
        self,
        app: Flask | None = None,
        *,
        refreshers: Mapping[str, Refresh] | None = None,
        login_url: str | Callable[[RefreshError], str | None] | None = None,
    ) -> None:
        self._refreshers = refreshers
        self._login_url = login_url
        if app is not None:
            self.init_app(app)

    @clears_locals
    def init_app(self, app: Flask) -> None:
        """Read the configuration of an application, and register the error handlers. Nothing is connected.

        Raises:
            ConfigurationError: The configuration is not acceptable, or the application has a token store.
            InvalidInputError: The namespace or a refresh setting is not acceptable.
        """
        if _EXTENSION in app.extensions:
            raise ConfigurationError("init_app was called for this application before")
        values: dict[str, Any] = {name: app.config.get(_PREFIX + name) for name in SETTINGS}
        if self._refreshers is not None:
            values["REFRESHERS"] = self._refreshers
        app.extensions[_EXTENSION] = _Stores(read_settings(values, lambda name: f'app.config["{_PREFIX}{name}"]'))
        for kind in LOGIN_ERRORS:
            app.register_error_handler(kind, self._answer_login)
        for other in OUTAGE_ERRORS:
            app.register_error_handler(other, _answer_outage)

    @property
    def store(self) -> sync.AuthTokenStore:
        """The current application's store for ``def`` views: see :mod:`tokenstore.sync`.

        It connects at its first use, so a server may fork its workers before. ``atexit`` closes it.

        Raises:
            ConfigurationError: ``init_app`` was not called for this application.
        """
        return _stores().sync

    @property
    def async_store(self) -> AuthTokenStore:
        """The current application's store for ``async def`` views: see :class:`tokenstore.AuthTokenStore`.

        Flask gives each request to an ``async def`` view an event loop of its own, so the store connects anew for each
        request. The end of the request closes it, and waits for refreshes in progress. ``def`` views are faster.

        Raises:
            ConfigurationError: ``init_app`` was not called for this application.
            UnsupportedOperationError: No event loop is running in this thread.
        """
        return _stores().by_loop.get()

    def _answer_login(self, error: RefreshError) -> Response:
        place = self._login_url
        if place is not None:
            place = login_place(place, error) if isinstance(place, str) else place(error)
        return _response(login_answer(error, place, redirect=shows_a_page(request.method, request.headers.get)))


class _Stores:
    """The stores of one application."""

    def __init__(self, settings: StoreSettings) -> None:
        self.sync = settings.open_sync()
        self.by_loop = LoopStores(settings.open)


def _stores() -> _Stores:
    found = current_app.extensions.get(_EXTENSION)
    if not isinstance(found, _Stores):
        raise ConfigurationError("this application has no token store: call init_app")
    return found


def _answer_outage(error: TokenStoreError) -> Response:
    return _response(outage_answer(error))


def _response(answer: Answer) -> Response:
    body = "" if "Location" in answer.headers else json.dumps(answer.body)
    return Response(body, answer.status, answer.headers, mimetype="application/json" if body else None)
