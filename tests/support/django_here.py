"""Django in the process of the tests, and a setting ``TOKENSTORE`` for the time of a block."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import django
from asgiref.sync import sync_to_async
from django.conf import settings
from django.http import HttpRequest, JsonResponse
from django.test.utils import override_settings
from django.urls import path

from support.django_project import KEYS
from support.sync_stores import ended_loop_thread

__all__ = ["raised", "token_store", "urlpatterns"]

raised: list[Exception] = []
"""The views raise a copy of the last one."""


def _plain(request: HttpRequest) -> JsonResponse:
    raise copy(raised[-1])


async def _awaiting(request: HttpRequest) -> JsonResponse:
    raise copy(raised[-1])


def _connect(request: HttpRequest, provider: str) -> JsonResponse:
    return JsonResponse({"provider": provider})


urlpatterns = [
    path("plain", _plain),
    path("awaiting", _awaiting),
    path("connect/<slug:provider>/", _connect, name="connect"),
    path("home/", _connect, name="home"),
]

if not settings.configured:
    # There is no TOKENSTORE: starting Django does not read it.
    settings.configure(
        ALLOWED_HOSTS=["testserver"],
        INSTALLED_APPS=["tokenstore.integrations.django"],
        LOGGING_CONFIG=None,
        MIDDLEWARE=["tokenstore.integrations.django.TokenStoreMiddleware"],
        ROOT_URLCONF="support.django_here",
        SECRET_KEY="made-up",
    )
    django.setup()
    # Starts the thread in which asgiref runs what is not async. It lasts, so no test leaves it behind.
    asyncio.run(sync_to_async(int)())


@contextmanager
def token_store(**setting: Any) -> Iterator[None]:
    """Set ``TOKENSTORE`` for a block. At its end the store of the block is closed."""
    with ended_loop_thread(), override_settings(TOKENSTORE={"URL": "memory://", "KEYS": KEYS, **setting}):
        yield
