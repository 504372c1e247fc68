"""Two keys and their names."""

from __future__ import annotations

from tokenstore import Keyring

NORTH, SOUTH = bytes(range(32)), bytes(range(32, 64))


def keyring_of(*names: str) -> Keyring:
    """A keyring with the keys "north" and "south", in the order given."""
    return Keyring({name: {"north": NORTH, "south": SOUTH}[name] for name in names})
