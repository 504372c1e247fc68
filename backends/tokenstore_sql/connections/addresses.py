"""Addresses of servers."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address

__all__ = ["is_loopback"]


def is_loopback(address: str) -> bool:
    """Whether a connection to an IP address stays on this machine.

    Args:
        address: The address. One of IPv6 may have a zone: ``fe80::1%eth0``.
    """
    found = ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        return found.ipv4_mapped.is_loopback
    return found.is_loopback
