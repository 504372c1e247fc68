"""Django's setting ``TOKENSTORE``: its check, and the URL of one of Django's databases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.core.checks import Error, run_checks
from django.http import HttpRequest
from django.test.utils import override_settings
from django.views.debug import get_exception_reporter_filter

from support.django_here import token_store
from support.django_project import KEYS
from support.missing_libraries import import_error
from tokenstore import ConfigurationError, Keyring, open_store
from tokenstore.integrations.django import database_url, get_store
from tokenstore.integrations.django.settings import store_settings
from tokenstore.refresh.attempt import Refresh

_POSTGRES = {"ENGINE": "django.db.backends.postgresql", "NAME": "app", "USER": "me", "PASSWORD": "p@ss/w", "HOST": "db"}
_MYSQL = {"ENGINE": "django.db.backends.mysql", "NAME": "app", "USER": "me", "HOST": "::1", "PORT": 3307}


async def _refresher(record: object) -> dict[str, Any]:
    raise NotImplementedError


REFRESHERS: dict[str, Refresh] = {"github": _refresher}
NOTHING: list[object] = []
seen: list[object] = []


def refreshed(record: object) -> None:
    seen.append(record)


def _problems() -> list[tuple[str, str]]:
    return [(str(message.id), message.msg) for message in run_checks(tags=["tokenstore"])]


def test_a_right_setting_passes_the_check(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.touch(0o600)
    keys.write_text(KEYS)
    right: dict[str, Any] = {
        "URL": f"sqlite:///{tmp_path}/store.db",
        "KEYS": None,
        "KEYS_FILE": keys,
        "NAMESPACE": "production",
        "REFRESHERS": f"{__name__}.REFRESHERS",
        "LOGIN_URL": "connect",
        "OPTIONS": {"refresh_timeout": 5, "pool_size": 2, "on_refreshed": f"{__name__}.refreshed"},
    }
    with token_store(**right):
        assert _problems() == []
        settings = store_settings()
    assert (settings.namespace, settings.keyring.names) == ("production", ("k1",))
    assert settings.refreshers is REFRESHERS
    assert settings.options["on_refreshed"] is refreshed
    assert list(tmp_path.iterdir()) == [keys]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"URL": None}, 'TOKENSTORE["URL"] is not set'),
        ({"URL": 5}, 'TOKENSTORE["URL"] must be a str'),
        ({"URL": "nosuch://made-up-secret"}, "no backend for nosuch://"),
        ({"URL": "sqlite:///x?colour=red"}, "unknown: colour"),
        ({"URLS": "x"}, "TOKENSTORE has no URLS; it has KEYS"),
        ({"KEYS": "made-up-secret"}, 'entry 1 of TOKENSTORE["KEYS"] is not of the form'),
        ({"KEYS_FILE": "keys"}, 'both TOKENSTORE["KEYS"] and TOKENSTORE["KEYS_FILE"]'),
        ({"KEYS": None}, "TOKENSTORE_KEYS is not set"),
        ({"KEYS": None, "KEYS_FILE": 1}, 'TOKENSTORE["KEYS_FILE"] must be a path'),
        ({"NAMESPACE": 1}, 'TOKENSTORE["NAMESPACE"] must be a str'),
        ({"REFRESHERS": "nosuch.tokens.REFRESHERS"}, "cannot be imported (ModuleNotFoundError)"),
        ({"REFRESHERS": "REFRESHERS"}, "cannot be imported (it names no module)"),
        ({"REFRESHERS": f"{__name__}.NOTHING"}, 'TOKENSTORE["REFRESHERS"] must be a mapping'),
        ({"OPTIONS": "pool_size=3"}, 'TOKENSTORE["OPTIONS"] must be a dict'),
        ({"OPTIONS": {"namespace": "x"}}, 'TOKENSTORE["OPTIONS"] cannot have namespace'),
        ({"OPTIONS": {"refresh_timeout": -1}}, "refresh_timeout"),
        ({"OPTIONS": {"on_error": "nosuch.f"}}, 'TOKENSTORE["OPTIONS"], on_error, is'),
        ({"LOGIN_URL": 5}, 'TOKENSTORE["LOGIN_URL"] must be a path'),
    ],
)
def test_the_check_says_what_is_wrong_without_secrets(wrong: dict[str, object], says: str) -> None:
    with token_store(**wrong):
        [(code, message)] = _problems()
    assert code == "tokenstore.E001"
    assert says in message
    assert "made-up-secret" not in message


@pytest.mark.parametrize("setting", [None, "sqlite:///x"])
def test_the_check_finds_a_missing_setting_and_one_of_another_type(setting: object) -> None:
    with override_settings(TOKENSTORE=setting):
        [(code, message)] = _problems()
        with pytest.raises(ConfigurationError, match="TOKENSTORE must be a dict"):
            get_store()
    assert (code, "must be a dict" in message) == ("tokenstore.E001", True)


def test_the_check_warns_of_a_store_that_is_not_shared() -> None:
    with token_store():
        [(code, message)] = _problems()
    assert code == "tokenstore.W001"
    assert "memory://" in message


@pytest.mark.parametrize("name", ["nosuch", "home"])
def test_the_check_finds_a_login_url_that_is_no_url_pattern_for_a_provider(name: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    with token_store(URL=url, REFRESHERS=REFRESHERS, LOGIN_URL=name):
        [message] = run_checks(tags=["tokenstore"])
    assert isinstance(message, Error)
    assert message.id == "tokenstore.E002"
    assert "takes 'github'" in message.msg


def test_keys_can_be_a_keyring(keyring: Keyring) -> None:
    """As of a key service."""
    with token_store(KEYS=keyring):
        assert store_settings().keyring is keyring


def test_the_debug_page_does_not_show_the_setting() -> None:
    with token_store():
        shown = get_exception_reporter_filter(HttpRequest()).get_safe_settings()
    assert set(shown["TOKENSTORE"]) == {"*"}


def test_the_settings_print_no_secret() -> None:
    with token_store(URL="postgresql+psycopg://me@db/app", OPTIONS={"password": "made-up-secret"}):
        assert "made-up-secret" not in repr(store_settings())


def test_without_django_the_error_names_the_extra() -> None:
    printed = import_error("tokenstore.integrations.django", "django")
    assert printed.startswith("MissingDependencyError")
    assert "tokenstore[django]" in printed


# -- a database of Django ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("database", "url"),
    [
        ({"ENGINE": "django.db.backends.sqlite3", "NAME": Path("/srv/a b.db")}, "sqlite:////srv/a b.db"),
        (_POSTGRES, "postgresql+psycopg://me:p%40ss%2Fw@db/app"),
        (
            {**_POSTGRES, "PORT": "5433", "OPTIONS": {"sslmode": "verify-full", "pool": True}},
            "postgresql+psycopg://me:p%40ss%2Fw@db:5433/app?sslmode=verify-full",
        ),
        ({**_POSTGRES, "HOST": "/run/pg", "PASSWORD": ""}, "postgresql+psycopg://me@/app?host=%2Frun%2Fpg"),
        (
            {"ENGINE": "django.contrib.gis.db.backends.postgis", "NAME": "app"},
            "postgresql+psycopg:///app",
        ),
        (
            {**_MYSQL, "OPTIONS": {"charset": "utf8mb4", "isolation_level": "read committed"}},
            "mysql://me@[::1]:3307/app?charset=utf8mb4",
        ),
        ({**_MYSQL, "HOST": "/run/my.sock", "PORT": ""}, "mysql://me@/app?unix_socket=%2Frun%2Fmy.sock"),
    ],
)
def test_the_url_of_a_database(database: dict[str, Any], url: str, keyring: Keyring) -> None:
    """Its store can be opened; nothing is connected."""
    assert database_url(database) == url
    _ = open_store(url, keyring=keyring)


def test_the_files_of_tls_to_mysql() -> None:
    database = {**_MYSQL, "OPTIONS": {"ssl": {"ca": "/ca.pem", "cert": "/cert.pem", "key": "/key.pem"}}}
    assert database_url(database).endswith("/app?ssl_ca=%2Fca.pem&ssl_cert=%2Fcert.pem&ssl_key=%2Fkey.pem")


@pytest.mark.parametrize(
    ("database", "says"),
    [
        ({"ENGINE": "django.db.backends.oracle", "NAME": "app"}, "oracle"),
        ({"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}, "sqlite3"),
        ({"ENGINE": "django.db.backends.sqlite3", "NAME": "file:x?mode=memory"}, "NAME"),
        ({**_POSTGRES, "NAME": ""}, "NAME"),
        ({**_POSTGRES, "OPTIONS": {"service": "x"}}, "the OPTIONS service may decide"),
        ({**_MYSQL, "OPTIONS": {"ssl_mode": "REQUIRED", "read_default_file": "x"}}, "read_default_file, ssl_mode"),
        ({**_MYSQL, "OPTIONS": {"ssl": {"cipher": "x"}}}, "the OPTIONS ssl may decide"),
    ],
)
def test_a_database_without_a_url(database: dict[str, Any], says: str) -> None:
    """An option that is not known is refused, because it may protect the connection."""
    with pytest.raises(ConfigurationError, match=says):
        database_url(database)
