"""Checks of the URLs that secrets are sent to."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from ipaddress import ip_address

from tokenstore.errors import ConfigurationError
from tokenstore.integrations._credentials import checked_text

__all__ = ["checked_hosts", "checked_url"]


def checked_hosts(hosts: Collection[str]) -> frozenset[str]:
    """The argument ``http_hosts``, lower-case.

    Raises:
        ConfigurationError: It is a str, or holds a public address.
    """
    if isinstance(hosts, str):
        raise ConfigurationError("http_hosts must be a collection of hosts, not one str")
    for host in hosts:
        with suppress(ValueError):
            if ip_address(checked_text("http_hosts", host)).is_global:
                raise ConfigurationError("http_hosts must not hold a public address: what goes there would be in clear")
    return frozenset(host.lower() for host in hosts)


def checked_url(name: str, url: str, private: frozenset[str]) -> tuple[str, bool]:
    """The host, and whether it is a loopback one or one of ``private``, which are lower-case.

    Raises:
        ConfigurationError: It is no URL to send secrets to.
    """
    import httpx  # the parser of the connection itself, so that both see the same host

    parsed = None
    with suppress(httpx.InvalidURL, TypeError, ValueError):
        parsed = httpx.URL(checked_text(name, url))
    if parsed is None or not parsed.host or re.search(r"\s", url):
        raise ConfigurationError(f"{name} is no URL with a host")
    if parsed.userinfo:
        raise ConfigurationError(f"{name} must not hold a user name or a password: use client_id and client_secret")
    if "#" in url:
        raise ConfigurationError(f"{name} must not have a fragment (RFC 6749 section 3.2)")
    loopback = parsed.host == "localhost"
    with suppress(ValueError):
        loopback = loopback or ip_address(parsed.host).is_loopback
    local = loopback or parsed.host.lower() in private
    if parsed.scheme != "https" and not (parsed.scheme == "http" and local):
        raise ConfigurationError(f"{name} must be https (http on loopback or http_hosts alone): it carries secrets")
    return parsed.host, local
