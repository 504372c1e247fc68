"""No error about the settings of a web application keeps a key or a password in tokenstore's own frames."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from flask import Flask

from support.django_here import token_store
from support.django_project import KEYS
from support.frame_walk import Walk
from tokenstore.integrations.django import database_url, get_async_store, get_store
from tokenstore.integrations.django.settings import store_settings
from tokenstore.integrations.flask import TokenStore

_PASSWORD = "PW-8e2b-planted"
_URL = f"postgresql+psycopg://me:{_PASSWORD}@127.0.0.1/app"


async def _get_async() -> None:
    get_async_store()


def _flask(setting: dict[str, Any]) -> None:
    app = Flask(__name__)
    app.config.update({f"TOKENSTORE_{name}": value for name, value in setting.items()})
    TokenStore(app)


@pytest.mark.parametrize(
    "wrong",
    [
        {"URL": f"{_URL}?colour=red"},
        {"URL": _URL.replace("postgresql", "nosuch")},
        {"URL": f"x{_URL}:".replace("://", ":")},
        {"KEYS": f"{KEYS},k2:short"},
        {"KEYS": f"{KEYS},{KEYS}"},
        {"NAMESPACE": 1},
        {"NAMESPACE": "\0"},
        {"REFRESHERS": "nosuch.tokens"},
        {"OPTIONS": {"colour": "red"}},
        {"URL": "postgresql+psycopg://me@127.0.0.1/app", "OPTIONS": {"password": _PASSWORD, "pool_size": -1}},
        {"OPTIONS": {"refresh_timeout": -1}},
    ],
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    walk = Walk((_PASSWORD, KEYS.partition(":")[2], bytes(range(32))))
    setting = {"URL": _URL, "KEYS": KEYS, **wrong}
    with token_store(**setting):
        walk.call("store_settings().open()", lambda: store_settings().open())
        walk.call("get_store", get_store)
        walk.call("get_async_store", lambda: asyncio.run(_get_async()))
    walk.call("init_app", _flask, setting)
    assert len(walk.paths) == 4


def test_a_database_without_a_url() -> None:
    walk = Walk([_PASSWORD])
    database = {"ENGINE": "django.db.backends.postgresql", "NAME": "app", "PASSWORD": _PASSWORD}
    walk.call("an option", database_url, {**database, "OPTIONS": {"service": "x"}})
    walk.call("an engine", database_url, {**database, "ENGINE": "x"})
    assert len(walk.paths) == 2
