"""The middleware that answers a request whose view has no fresh token."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ClassVar

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import HttpResponse, JsonResponse
from django.utils.encoding import iri_to_uri

from tokenstore.integrations._web import LOGIN_ERRORS, OUTAGE_ERRORS, login_answer, outage_answer, shows_a_page
from tokenstore.integrations.django.settings import login_url

if TYPE_CHECKING:
    from django.http import HttpRequest, HttpResponseBase

__all__ = ["TokenStoreMiddleware"]


class TokenStoreMiddleware:
    """Turns the errors of a view that has no fresh token into responses. For ``def`` and ``async def`` views.

    - The user has to log in (:class:`~tokenstore.ReauthorizationRequiredError`,
      :class:`~tokenstore.TokensMissingError`, :class:`~tokenstore.InsufficientScopeError`): 303 to the place that
      ``TOKENSTORE["LOGIN_URL"]`` names if the request is one of a browser for a page, else 401.
    - The provider or the database cannot serve now: 503 with ``Retry-After``.

    All other errors are left to Django. It is the exception of the view that counts, so its place among the other
    middleware does not matter, and ``ATOMIC_REQUESTS`` has rolled back before.

    Args:
        get_response: The next middleware, or the view.
    """

    sync_capable: ClassVar[bool] = True
    async_capable: ClassVar[bool] = True

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase | Awaitable[HttpResponseBase]]) -> None:
        self._get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        """Pass the request on. Under ASGI the result is awaited."""
        return self._get_response(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        """Answer for a view that raised an exception. Django calls this, in a thread if the view is async.

        Args:
            request: The request.
            exception: What the view raised.

        Returns:
            The response; None leaves the exception to others.

        Raises:
            ConfigurationError: ``TOKENSTORE["LOGIN_URL"]`` is not acceptable.
        """
        if isinstance(exception, LOGIN_ERRORS):
            find = login_url()
            place = None if find is None else find(request, exception)
            headers: Any = request.headers
            answer = login_answer(exception, place, redirect=shows_a_page(request.method or "", headers.get))
        elif isinstance(exception, OUTAGE_ERRORS):
            answer = outage_answer(exception)
        else:
            return None
        if (location := answer.headers.get("Location")) is not None:
            # As in Django's own redirects: what is not allowed in a header is quoted.
            return HttpResponse(status=answer.status, headers={**answer.headers, "Location": iri_to_uri(location)})
        return JsonResponse(answer.body, status=answer.status, headers=answer.headers)
