"""``manage.py`` of a real project: the app's command, its check, and tests of the project's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.django_project import Project
from support.web_rows import EXPIRED, Rows
from tokenstore import Keyring
from tokenstore.testing.provider import StrictRotatingProvider

pytestmark = pytest.mark.sqlite


@pytest.fixture
def provider() -> Iterator[StrictRotatingProvider]:
    with StrictRotatingProvider() as provider:
        yield provider


@pytest.fixture
def project(tmp_path: Path, provider: StrictRotatingProvider) -> Project:
    return Project(tmp_path / "project", tmp_path / "store.db", provider)


def test_manage_py_sets_the_tables_up_and_refreshes(
    project: Project, provider: StrictRotatingProvider, tmp_path: Path, keyring: Keyring
) -> None:
    """The URL, the keys and the refreshers are those of the setting. Django's own options may stand at the end."""
    done = project.manage("tokenstore", "init", "--settings=project.settings")
    assert (done.returncode, done.stdout, done.stderr) == (0, "the tables are ready\n", "")
    rows = Rows(f"sqlite:///{tmp_path}/store.db", keyring, provider)
    rows.log_in("user", EXPIRED)
    done = project.manage("tokenstore", "refresh-due", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["outcome"] == "refreshed"
    assert rows.has_new_tokens("user")
    assert provider.stats().refreshes == 1


def test_manage_py_check_reports_a_wrong_setting(project: Project) -> None:
    done = project.manage("check", more={"URL": "nosuch://made-up-secret"})
    assert done.returncode == 1
    assert "(tokenstore.E001) no backend for nosuch://" in done.stderr
    assert "made-up-secret" not in done.stderr


def test_a_project_tests_its_views_with_django_s_test_runner(
    project: Project, provider: StrictRotatingProvider
) -> None:
    """With another setting for the tests: in memory for ``def`` views, a file for both kinds."""
    project.write(
        "project/tests.py",
        """
        import asyncio, tempfile
        from datetime import UTC, datetime, timedelta
        from pathlib import Path
        from django.conf import settings
        from django.test import SimpleTestCase, override_settings
        from tokenstore.integrations.django import get_async_store, get_store

        HOUR_AGO = datetime.now(UTC) - timedelta(hours=1)
        MEMORY = {**settings.TOKENSTORE, "URL": "memory://"}

        @override_settings(TOKENSTORE=MEMORY)
        class PlainTest(SimpleTestCase):
            def test_a_user_without_tokens(self):
                self.assertEqual(self.client.get("/plain/nobody").status_code, 401)

            def test_a_user_with_a_token(self):
                get_store().store_tokens("github", "user", "a", "r", None)
                self.assertEqual(self.client.get("/plain/user").status_code, 200)

        class BothTest(SimpleTestCase):
            def setUp(self):
                folder = tempfile.TemporaryDirectory()
                self.addCleanup(folder.cleanup)
                setting = {**settings.TOKENSTORE, "URL": f"sqlite:///{folder.name}/test.db"}
                override = override_settings(TOKENSTORE=setting)
                override.enable()
                self.addCleanup(override.disable)
                get_store().setup()

            async def test_an_async_view(self):
                await get_async_store().store_tokens("github", "user", "a", "r", None)
                response = await self.async_client.get("/awaiting/user")
                self.assertEqual(response.status_code, 200)

            def test_an_async_view_with_the_client(self):
                get_store().store_tokens("github", "user", "a", "refused", HOUR_AGO)
                self.assertEqual(self.client.get("/awaiting/user").status_code, 401)
        """,
    )
    done = project.manage("test", "project")
    assert done.returncode == 0, done.stderr
    assert "Ran 4 tests" in done.stderr
    assert "Warning" not in done.stderr
    assert provider.stats().refreshes == 0
