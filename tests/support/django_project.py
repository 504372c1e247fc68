"""A project of Django in a folder of its own, and its ``manage.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

from tokenstore.testing.provider import StrictRotatingProvider

__all__ = ["FILES", "KEYS", "Project"]

KEYS = "k1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"
"""The fixture ``keyring``, as a setting."""

FILES = {
    "manage.py": """
        import os, sys
        from django.core.management import execute_from_command_line
        os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
        execute_from_command_line(sys.argv)
    """,
    "project/__init__.py": "",
    "project/settings.py": """
        import ast, os
        from tokenstore.integrations.django import database_url
        DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["STORE_FILE"]}}
        SECRET_KEY = "made-up"
        ALLOWED_HOSTS = ["127.0.0.1", "testserver"]
        ROOT_URLCONF = "project.urls"
        INSTALLED_APPS = ["tokenstore.integrations.django"]
        MIDDLEWARE = [
            "tokenstore.integrations.django.TokenStoreMiddleware",
            "django.middleware.common.CommonMiddleware",
        ]
        TOKENSTORE = {
            "URL": database_url(DATABASES["default"]),
            "KEYS": os.environ["STORE_KEYS"],
            "REFRESHERS": "project.tokens.REFRESHERS",
            "LOGIN_URL": "connect",
            **ast.literal_eval(os.environ.get("STORE_MORE", "{}")),
        }
    """,
    "project/tokens.py": """
        import os
        from tokenstore.integrations.oauth2 import OAuth2Refresher
        REFRESHERS = {
            "github": OAuth2Refresher(os.environ["TOKEN_URL"], os.environ["CLIENT_ID"], os.environ["CLIENT_SECRET"])
        }
    """,
    "project/views.py": """
        import os
        from django.http import JsonResponse
        from tokenstore.integrations.django import get_async_store, get_store

        def show(record):
            return JsonResponse({"generation": record["generation"], "process": os.getpid()})

        def plain(request, user):
            return show(get_store().load_fresh_tokens("github", user, missing="raise"))

        async def awaiting(request, user):
            return show(await get_async_store().load_fresh_tokens("github", user, missing="raise"))

        def connect(request, provider):
            return JsonResponse({"provider": provider})
    """,
    "project/urls.py": """
        from django.urls import path
        from project import views
        urlpatterns = [
            path("plain/<user>", views.plain),
            path("awaiting/<user>", views.awaiting),
            path("connect/<provider>/", views.connect, name="connect"),
        ]
    """,
    # As with gunicorn's option `--preload`, and a start that already uses the store.
    "project/wsgi.py": """
        import os
        from django.core.wsgi import get_wsgi_application
        os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
        application = get_wsgi_application()
        from tokenstore.integrations.django import get_store
        get_store().load_tokens("github", "nobody")
    """,
    "project/asgi.py": """
        import os
        from django.core.asgi import get_asgi_application
        os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
        from tokenstore.integrations.django import with_lifespan
        application = with_lifespan(get_asgi_application())
    """,
}
"""The project, by path."""


class Project:
    """Writes the project.

    Args:
        folder: An empty folder.
        file: The SQLite file of Django and of the store.
        provider: The provider, which the store knows as ``github``.
    """

    def __init__(self, folder: Path, file: Path, provider: StrictRotatingProvider) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
            "STORE_FILE": str(file),
            "STORE_KEYS": KEYS,
            "TOKEN_URL": provider.token_url,
            "CLIENT_ID": provider.client_id,
            "CLIENT_SECRET": provider.client_secret,
        }
        for path, text in FILES.items():
            self.write(path, text)

    def write(self, path: str, text: str) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(dedent(text))

    def manage(
        self, *arguments: str, more: Mapping[str, object] | None = None, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run ``manage.py`` with warnings as errors; `more` are settings of the store."""
        return subprocess.run(
            [sys.executable, "-W", "error", "manage.py", *arguments],
            cwd=self.folder,
            env={**self.environment, "STORE_MORE": repr(more or {})},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
