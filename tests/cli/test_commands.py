"""The commands from `init` to `delete`, on every database."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from support.command_line import ACCESS, KEYS, NESTED, REFRESH, RESPONSE, SECRETS, cli, on_store, shows_no_secret
from support.matrix import Row, shared_rows
from tokenstore import generate_key


@shared_rows
def test_each_command_works_on_every_database(row: Row, url: str) -> None:
    """Each command prints text or JSON, and prints tokens only with the option for it."""
    assert cli("init", url=url, keys=None) == (0, "the tables are ready\n", "")
    assert cli("init", "--json", url=url).rows == [{"ready": True}]
    stored = cli("put", "github", "u1", "--json", url=url, stdin=json.dumps(RESPONSE))
    [summary] = stored.rows
    assert summary["has_refresh_token"]
    assert summary["extra_fields"] == ["expires_in", "id_token", "token_type"]

    shown = cli("show", "github", "u1", "--json", url=url)
    [record] = shown.rows
    stamps = {
        name: datetime.fromisoformat(record.pop(name))
        for name in list(record)
        if name.endswith("_at") and record[name] is not None
    }
    assert all(stamp.utcoffset() == timedelta(0) for stamp in stamps.values())
    assert set(stamps) == {"access_token_expires_at", "refresh_token_expires_at", "created_at", "updated_at"}
    assert stamps["refresh_token_expires_at"] - stamps["access_token_expires_at"] >= timedelta(seconds=3599)
    assert isinstance(record.pop("generation"), int)
    assert record == {
        "provider": "github",
        "user_id": "u1",
        "account": "",
        "access_token_valid": True,
        "refresh_token_valid": True,
        "has_refresh_token": True,
        "access_token_expiry_known": True,
        "extra_fields": ["expires_in", "id_token", "token_type"],
        "metadata_fields": [],
        "key_id": "k1",
        "metadata_key_id": None,
        "needs_reseal": False,
        "status": "valid",
        "failure_code": None,
        "failed_at": None,
        "retry_at": None,
    }
    text, table = cli("show", "github", "u1", url=url), cli("list", url=url)
    [entry] = cli("list", "--json", url=url).rows
    assert set(entry) == {
        "provider",
        "user_id",
        "account",
        "access_token_expires_at",
        "refresh_token_expires_at",
        "access_token_expiry_known",
        "has_refresh_token",
        "generation",
        "key_id",
        "metadata_key_id",
        "created_at",
        "updated_at",
        "needs_reseal",
        "status",
        "failure_code",
        "failed_at",
        "retry_at",
    }
    shows_no_secret(stored, shown, text, table, cli("list", "--json", url=url))
    assert "valid" in text.out

    revealed = cli("show", "github", "u1", "--reveal", "--json", url=url).rows[0]
    assert (revealed["access_token"], revealed["refresh_token"]) == (ACCESS, REFRESH)
    assert revealed["extra"] == {"id_token": NESTED, "token_type": "Bearer", "expires_in": 3600}
    assert all(secret in cli("show", "github", "u1", "--reveal", url=url).out for secret in SECRETS)

    deleted = {"provider": "github", "user_id": "u1", "account": "", "deleted": True}
    assert cli("delete", "github", "u1", "--yes", "--json", url=url).rows == [deleted]
    assert cli("delete", "github", "u1", "--yes", url=url).code == 1
    assert cli("show", "github", "u1", url=url).code == 1
    assert cli("list", url=url) == (0, "", "no rows\n")


@shared_rows
def test_the_error_for_a_missing_table_names_init(row: Row, url: str) -> None:
    done = cli("list", url=url)
    assert (done.code, done.out) == (3, "")
    assert re.fullmatch(r"error: .*tokenstore init.*\n", done.err)


@shared_rows
def test_init_list_and_delete_need_no_keys_put_and_show_do(row: Row, url: str) -> None:
    assert cli("init", url=url, keys=None).code == 0
    assert cli("put", "github", "u1", url=url, stdin=json.dumps(RESPONSE)).code == 0
    [entry] = cli("list", "--json", url=url, keys=None).rows
    assert entry["needs_reseal"] is None  # unknown without keys
    for command in (["show", "github", "u1"], ["put", "github", "u1"]):
        done = cli(*command, url=url, keys=None, stdin=json.dumps(RESPONSE))
        assert done.code == 2
        assert "tokenstore keygen" in done.err
    assert cli("delete", "github", "u1", "--yes", url=url, keys=None).code == 0


@shared_rows
def test_a_row_that_cannot_be_opened_has_its_own_exit_code(row: Row, url: str) -> None:
    cli("init", url=url)
    cli("put", "github", "u1", url=url, stdin=json.dumps(RESPONSE))
    unknown = cli("show", "github", "u1", url=url, keys=generate_key("other"))
    namesake = cli("show", "github", "u1", "--reveal", url=url, keys=generate_key("k1"))
    assert unknown.code == namesake.code == 4
    shows_no_secret(unknown, namesake)
    rotated = f"{generate_key('k2')},{KEYS}"
    assert [entry["needs_reseal"] for entry in cli("list", "--json", url=url, keys=rotated).rows] == [True]
    assert "k1 (not the primary key)" in cli("list", url=url, keys=rotated).out
    assert cli("show", "github", "u1", "--json", url=url, keys=rotated).rows[0]["needs_reseal"] is True


def test_metadata_is_shown_by_name_and_with_their_own_key(tmp_path: Path) -> None:
    """Their values are secrets: only --reveal prints them. ``put`` leaves them as they are."""
    url, newer = f"sqlite:///{tmp_path}/t.db", f"{generate_key('k2')},{KEYS}"

    cli("init", url=url)
    on_store(url, lambda store: store.store_tokens("github", "u1", ACCESS, REFRESH, None, metadata={"note": NESTED}))
    assert cli("put", "github", "u1", url=url, stdin=json.dumps(RESPONSE), keys=newer).code == 0
    done = [cli("show", "github", "u1", "--json", url=url, keys=newer), cli("list", "--json", url=url, keys=newer)]
    for command in done:
        [row] = command.rows
        assert (row["key_id"], row["metadata_key_id"], row["needs_reseal"]) == ("k2", "k1", True)
    assert done[0].rows[0]["metadata_fields"] == ["note"]
    done += [cli("show", "github", "u1", url=url, keys=newer), cli("list", url=url, keys=newer)]
    for command in done[2:]:
        assert "k2, metadata k1 (not the primary key)" in " ".join(command.out.split())
    shows_no_secret(*done)
    revealed = cli("show", "github", "u1", "--reveal", "--json", url=url, keys=newer).rows[0]
    assert revealed["metadata"] == {"note": NESTED}
    assert f'metadata: {{"note": "{NESTED}"}}' in cli("show", "github", "u1", "--reveal", url=url, keys=newer).out


@pytest.mark.parametrize("command", ["list", "show github u1", "delete github u1 --yes", "put github u1"])
def test_a_mistyped_path_is_told_and_no_file_is_created(tmp_path: Path, command: str) -> None:
    done = cli(*command.split(), url=f"sqlite:///{tmp_path}/tokns.db", stdin='{"access_token": "gho_abc"}')
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith(f"error: there is no database file {tmp_path}/tokns.db: check the path")
    assert list(tmp_path.iterdir()) == []
