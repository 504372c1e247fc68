"""No log line and no error contains a token, a key or a password."""

from __future__ import annotations

import asyncio
import base64
import logging
from datetime import UTC, datetime, timedelta

import pytest

from support.database import Place, app_engine, password_of
from support.error_text import assert_silent
from support.matrix import shared_rows
from support.tagged_tokens import REFRESH, load_tag, opened
from tokenstore import AuthTokenStore, BackendError, Keyring, open_store

ACCESS = "gho_plaintext_access"
SECRETS = (ACCESS, REFRESH)


def _in(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


@shared_rows
def test_no_log_line_or_error_contains_a_token_a_key_or_the_password(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """All loggers are at DEBUG, with SQLAlchemy's echo. The calls include successes, lock timeouts and refused rows."""
    key = bytes(range(200, 232))
    keyring = Keyring({"secret": key})
    secrets = [
        *SECRETS,
        password_of(place),
        key.hex(),
        repr(key)[2:-1],
        base64.urlsafe_b64encode(key).decode().rstrip("="),
        base64.b64encode(key).decode().rstrip("="),
    ]
    caplog.set_level(logging.DEBUG)
    for name in ("sqlalchemy", "sqlalchemy.engine", "sqlalchemy.pool", "aiosqlite", "asyncpg", "psycopg", "aiomysql"):
        caplog.set_level(logging.DEBUG, logger=name)

    async def main() -> None:
        async with opened(place, keyring, lock_timeout=0.3) as store, app_engine(place, echo="debug") as engine:
            on_engine = open_store(engine, keyring=keyring, lock_timeout=0.3, **place.options)

            async def refused(each: AuthTokenStore, user_id: str) -> None:
                with pytest.raises(BackendError) as caught:
                    await each.store_tokens("github", user_id, ACCESS, REFRESH, _in(60))
                assert_silent(caught.value, *secrets)

            for each in (store, on_engine):
                await each.store_tokens("github", "u1", ACCESS, REFRESH, _in(60), extra={"id_token": ACCESS})
                assert await load_tag(each) == ACCESS
            async with place.held():
                await asyncio.gather(refused(store, "u1"), refused(on_engine, "u1"))
            await _refuse_writes(place)
            await asyncio.gather(refused(store, "u9"), refused(on_engine, "u9"))

    asyncio.run(main())
    assert len(caplog.records) > 20
    text = caplog.text + "".join(repr(record.args) + repr(record.__dict__) for record in caplog.records)
    for secret in secrets:
        assert secret not in text


async def _refuse_writes(place: Place) -> None:
    """Let the table refuse all new rows; some databases quote the refused row in the error."""
    async with app_engine(place) as engine, engine.begin() as connection:
        if place.row.mark == "sqlite":
            await connection.exec_driver_sql(
                f"CREATE TRIGGER refuse BEFORE INSERT ON {place.table} BEGIN SELECT RAISE(ABORT, 'refused'); END"
            )
        elif place.row.mark == "postgres":
            await connection.exec_driver_sql(
                f"ALTER TABLE {place.table} ADD CONSTRAINT refuse CHECK (created_at < 0) NOT VALID"
            )
        else:
            await connection.exec_driver_sql(
                f"CREATE TRIGGER refuse_{place.table} BEFORE INSERT ON {place.table} FOR EACH ROW "
                "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'refused'"
            )
