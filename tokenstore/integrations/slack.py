"""Installation stores of slack_sdk and Bolt whose tokens are refreshed once; needs the extra ``slack``.

A workspace is a user of the store, and its tokens are accounts of that user: ``"bot"``, and ``"user:U0123"`` for each
person who gave the application a token of their own. What else Slack tells of an installation is in the metadata of
each row.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from tokenstore.errors import (
    ConfigurationError,
    InvalidInputError,
    MissingDependencyError,
    ReauthorizationRequiredError,
    SealingError,
)
from tokenstore.records import TokenRecord
from tokenstore.store import AuthTokenStore
from tokenstore.sync import AuthTokenStore as SyncAuthTokenStore

try:
    from slack_sdk.oauth.installation_store import Bot, Installation, InstallationStore
    from slack_sdk.oauth.installation_store.async_installation_store import AsyncInstallationStore
except ImportError:
    raise MissingDependencyError(
        'tokenstore.integrations.slack needs slack_sdk: pip install "tokenstore[slack]"'
    ) from None

__all__ = ["AsyncSlackInstallationStore", "SlackInstallationStore"]

T = TypeVar("T")

_LOGGER: Final = logging.getLogger("tokenstore.slack")
_BOT: Final = "bot"
_USER: Final = "user:"
# What Slack tells beside the tokens, by the names of slack_sdk's attributes.
_SHARED_FIELDS: Final = (
    "app_id",
    "enterprise_id",
    "enterprise_name",
    "team_id",
    "team_name",
    "is_enterprise_install",
    "installed_at",
    "custom_values",
)
_BOT_FIELDS: Final = ("bot_id", "bot_user_id", "bot_scopes")
_USER_FIELDS: Final = (
    "enterprise_url",
    "user_id",
    "user_scopes",
    "incoming_webhook_url",
    "incoming_webhook_channel",
    "incoming_webhook_channel_id",
    "incoming_webhook_configuration_url",
    "token_type",
)
_FIELDS_OF_BOT: Final = (*_SHARED_FIELDS, *_BOT_FIELDS)
_FIELDS_OF_INSTALLATION: Final = (*_SHARED_FIELDS, *_BOT_FIELDS, *_USER_FIELDS)


class AsyncSlackInstallationStore(AsyncInstallationStore):
    """An installation store for Bolt's ``AsyncApp`` and for slack_sdk.

    A token that is found is fresh: if it has expired, the store refreshes it first, once for all tasks, processes and
    machines. What is found has no refresh token and no expiry, so Bolt's own rotation, which has no lock, has nothing
    to do. Find a token again before each use, as Bolt does for each event.

    A workspace or a person who has to install the application again, because Slack accepts the refresh token no longer,
    is not found. A logged warning says so. If Slack does not answer, finding raises the store's error.

    What was found may be changed and saved again, for example with other ``custom_values``: a token that is saved
    without a refresh token does not replace a token of the same Slack application that has one. (Slack's token rotation
    cannot be turned off: https://docs.slack.dev/authentication/using-token-rotation.)

    Args:
        store: The store. For token rotation it needs a refresher for the provider:
            ``refreshers={"slack": OAuth2Refresher.for_provider("slack", client_id=…, client_secret=…)}``.
        provider: The provider's name in the store. Slack applications that share a store need a name each.
    """

    def __init__(self, store: AuthTokenStore, *, provider: str = "slack") -> None:
        self._store = store
        self._provider = provider

    @property
    def logger(self) -> logging.Logger:
        """The logger ``tokenstore.slack``."""
        return _LOGGER

    async def async_save(self, installation: Installation) -> None:
        """Store the tokens of an installation: the bot's, and those of the person who installed.

        Raises:
            InvalidInputError: The installation has no token, or a value cannot be stored.
            BackendError: The database refused or failed.
        """
        if not installation.bot_token and not installation.user_token:
            raise InvalidInputError("a Slack installation needs a bot token or a user token")
        workspace = _workspace(installation.enterprise_id, installation.team_id, installation.is_enterprise_install)
        fields = _fields(installation, _FIELDS_OF_INSTALLATION)
        if installation.user_token:
            await self._save(
                workspace,
                _USER + installation.user_id,
                fields,
                installation.user_token,
                installation.user_refresh_token,
                installation.user_token_expires_at,
            )
        if installation.bot_token:
            await self._save(
                workspace,
                _BOT,
                fields,
                installation.bot_token,
                installation.bot_refresh_token,
                installation.bot_token_expires_at,
            )

    async def async_save_bot(self, bot: Bot) -> None:
        """Store a bot's tokens.

        Raises:
            InvalidInputError: A value cannot be stored.
            BackendError: The database refused or failed.
        """
        workspace = _workspace(bot.enterprise_id, bot.team_id, bot.is_enterprise_install)
        fields = _fields(bot, _FIELDS_OF_BOT)
        await self._save(workspace, _BOT, fields, bot.bot_token, bot.bot_refresh_token, bot.bot_token_expires_at)

    async def async_find_bot(
        self, *, enterprise_id: str | None, team_id: str | None, is_enterprise_install: bool | None = False
    ) -> Bot | None:
        """Find a workspace's bot, with a fresh token.

        Raises:
            RefreshError: The token has expired and could not be refreshed now.
            BackendError: The database refused or failed.
        """
        record = await self._load(_workspace(enterprise_id, team_id, is_enterprise_install), _BOT)
        if record is None:
            return None
        return Bot(bot_token=record["access_token"], **{"installed_at": 0.0, **_known(record, _FIELDS_OF_BOT)})

    async def async_find_installation(
        self,
        *,
        enterprise_id: str | None,
        team_id: str | None,
        user_id: str | None = None,
        is_enterprise_install: bool | None = False,
    ) -> Installation | None:
        """Find an installation, with fresh tokens: the bot's, and those of a person if they gave some.

        Args:
            enterprise_id: The organisation.
            team_id: The workspace.
            user_id: The person who installed. Default: whoever did so last.
            is_enterprise_install: Whether the application is installed in the whole organisation.

        Raises:
            RefreshError: A token has expired and could not be refreshed now.
            BackendError: The database refused or failed.
        """
        workspace = _workspace(enterprise_id, team_id, is_enterprise_install)
        bot = await self._load(workspace, _BOT)
        installer = None if bot is None else bot["metadata"].get("user_id")
        person = user_id or installer or await self._last_installer(workspace)
        if person is None:
            return None
        user = await self._load(workspace, _USER + person)
        if user is None and person != installer:
            return None
        fields = {} if bot is None else _known(bot, _FIELDS_OF_INSTALLATION)
        if user is not None:
            fields |= _known(user, (*_SHARED_FIELDS, *_USER_FIELDS))
        return Installation(
            bot_token=None if bot is None else bot["access_token"],
            user_token=None if user is None else user["access_token"],
            **fields,
        )

    async def async_delete_bot(self, *, enterprise_id: str | None, team_id: str | None) -> None:
        """Delete a workspace's bot. Without a workspace: that of the organisation.

        Raises:
            BackendError: The database refused or failed.
        """
        await self._store.delete_tokens(self._provider, _workspace(enterprise_id, team_id), account=_BOT)

    async def async_delete_installation(
        self, *, enterprise_id: str | None, team_id: str | None, user_id: str | None = None
    ) -> None:
        """Delete the tokens of a person, or of all people, in a workspace; the bot's stay.

        Raises:
            BackendError: The database refused or failed.
        """
        workspace = _workspace(enterprise_id, team_id)
        async for entry in self._store.list_tokens(provider=self._provider, user_id=workspace):
            account = entry["account"]
            if account.startswith(_USER) and user_id in (None, account.removeprefix(_USER)):
                await self._store.delete_tokens(self._provider, workspace, account=account)
        bot = await self._store.load_tokens(self._provider, workspace, account=_BOT)
        if bot is not None and user_id in (None, bot["metadata"].get("user_id")):
            # The bot no longer tells of the person who installed it.
            nothing: dict[str, Any] = dict.fromkeys(_USER_FIELDS)
            await self._store.update_metadata(self._provider, workspace, nothing, account=_BOT)

    async def _save(
        self,
        workspace: str,
        account: str,
        fields: dict[str, Any],
        token: str,
        refresh_token: str | None,
        expires_at: int | None,
    ) -> None:
        key = self._provider, workspace
        if refresh_token is None and await self._can_refresh(workspace, account, fields["app_id"]):
            await self._store.update_metadata(*key, fields, account=account)
            return
        expiry = None if expires_at is None else datetime.fromtimestamp(expires_at, UTC)
        metadata = {name: value for name, value in fields.items() if value is not None}
        await self._store.store_tokens(*key, token, refresh_token, expiry, account=account, metadata=metadata)

    async def _can_refresh(self, workspace: str, account: str, app_id: str | None) -> bool:
        """Whether the row has a refresh token of this Slack application."""
        try:
            record = await self._store.load_tokens(self._provider, workspace, account=account)
        except SealingError:  # a new installation replaces what does not open
            return False
        return record is not None and record["refresh_token"] is not None and record["metadata"].get("app_id") == app_id

    async def _load(self, workspace: str, account: str) -> TokenRecord | None:
        """Load a fresh token; None if there is none that could be had without a person."""
        key = self._provider, workspace
        try:
            return await self._store.load_fresh_tokens(*key, account=account)
        except ReauthorizationRequiredError as error:
            _LOGGER.warning("The Slack application has to be installed again: %s", error)
            return None
        except ConfigurationError:
            # Without a refresher, which tokens without rotation do not need, a missing row is an error, too.
            if await self._store.load_tokens(*key, account=account) is None:
                return None
            raise

    async def _last_installer(self, workspace: str) -> str | None:
        """Whoever installed last and gave a token of their own; None if nobody did."""
        entries = self._store.list_tokens(provider=self._provider, user_id=workspace, with_metadata=True)
        found = [entry["metadata"] async for entry in entries if entry["account"].startswith(_USER)]
        return max(found, key=lambda fields: fields["installed_at"])["user_id"] if found else None


class SlackInstallationStore(InstallationStore):
    """An installation store for Bolt's ``App`` and for slack_sdk, without ``await``.

    It does what :class:`AsyncSlackInstallationStore` does.

    Args:
        store: The store without ``await``.
        provider: The provider's name in the store. Slack applications that share a store need a name each.
    """

    def __init__(self, store: SyncAuthTokenStore, *, provider: str = "slack") -> None:
        self._store = store
        self._provider = provider

    @property
    def logger(self) -> logging.Logger:
        """The logger ``tokenstore.slack``."""
        return _LOGGER

    def save(self, installation: Installation) -> None:
        """See :meth:`AsyncSlackInstallationStore.async_save`."""
        self._run(lambda store: store.async_save(installation))

    def save_bot(self, bot: Bot) -> None:
        """See :meth:`AsyncSlackInstallationStore.async_save_bot`."""
        self._run(lambda store: store.async_save_bot(bot))

    def find_bot(
        self, *, enterprise_id: str | None, team_id: str | None, is_enterprise_install: bool | None = False
    ) -> Bot | None:
        """See :meth:`AsyncSlackInstallationStore.async_find_bot`."""
        return self._run(
            lambda store: store.async_find_bot(
                enterprise_id=enterprise_id, team_id=team_id, is_enterprise_install=is_enterprise_install
            )
        )

    def find_installation(
        self,
        *,
        enterprise_id: str | None,
        team_id: str | None,
        user_id: str | None = None,
        is_enterprise_install: bool | None = False,
    ) -> Installation | None:
        """See :meth:`AsyncSlackInstallationStore.async_find_installation`."""
        return self._run(
            lambda store: store.async_find_installation(
                enterprise_id=enterprise_id,
                team_id=team_id,
                user_id=user_id,
                is_enterprise_install=is_enterprise_install,
            )
        )

    def delete_bot(self, *, enterprise_id: str | None, team_id: str | None) -> None:
        """See :meth:`AsyncSlackInstallationStore.async_delete_bot`."""
        self._run(lambda store: store.async_delete_bot(enterprise_id=enterprise_id, team_id=team_id))

    def delete_installation(
        self, *, enterprise_id: str | None, team_id: str | None, user_id: str | None = None
    ) -> None:
        """See :meth:`AsyncSlackInstallationStore.async_delete_installation`."""
        self._run(
            lambda store: store.async_delete_installation(enterprise_id=enterprise_id, team_id=team_id, user_id=user_id)
        )

    def _run(self, work: Callable[[AsyncSlackInstallationStore], Awaitable[T]]) -> T:
        return self._store.run(lambda aio: work(AsyncSlackInstallationStore(aio, provider=self._provider)))


def _workspace(enterprise_id: str | None, team_id: str | None, is_enterprise_install: bool | None = False) -> str:
    """The store's user: an organisation and a workspace, as slack_sdk's own stores name them."""
    return f"{enterprise_id or 'none'}-{'none' if is_enterprise_install else team_id or 'none'}"


def _fields(found: Installation | Bot, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(found, name) for name in names}


def _known(record: TokenRecord, names: Iterable[str]) -> dict[str, Any]:
    """What the metadata says of these names. Other fields are the application's own."""
    return {name: record["metadata"][name] for name in names if name in record["metadata"]}
