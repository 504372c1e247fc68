"""A Django app: the store in sync and async views, a middleware, a check and a command; needs the extra ``django``.

::

    # settings.py
    INSTALLED_APPS = [..., "tokenstore.integrations.django"]
    MIDDLEWARE = [..., "tokenstore.integrations.django.TokenStoreMiddleware"]
    TOKENSTORE = {
        "URL": os.environ["TOKENSTORE_URL"],
        "REFRESHERS": "project.tokens.REFRESHERS",
        "LOGIN_URL": "/connect/{provider}/",
    }

    # asgi.py
    application = with_lifespan(get_asgi_application())

    # views.py
    def repositories(request):
        record = get_store().load_fresh_tokens("github", request.user.get_username(), missing="raise")
        ...

``docs/web-frameworks.md`` lists the settings. Importing the app, and starting Django, connects to no database.
"""

from __future__ import annotations

from tokenstore.errors import MissingDependencyError

try:
    import django as _django  # noqa: F401  # so that the error below is raised for nothing but a missing Django
except ImportError:
    raise MissingDependencyError(
        'tokenstore.integrations.django needs Django: pip install "tokenstore[django]"'
    ) from None

from tokenstore.integrations.django.asgi import with_lifespan
from tokenstore.integrations.django.databases import database_url
from tokenstore.integrations.django.middleware import TokenStoreMiddleware
from tokenstore.integrations.django.stores import get_async_store, get_store

__all__ = ["TokenStoreMiddleware", "database_url", "get_async_store", "get_store", "with_lifespan"]
