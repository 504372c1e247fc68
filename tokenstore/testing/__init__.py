"""Tools for the tests of an application that uses tokenstore, and of a backend.

For an application (``docs/testing.md``), whether it uses the fixtures of the pytest plugin or not:

* :class:`TokenProvider`, :class:`SyncTokenProvider`: a provider together with a store of its users' tokens.
* :class:`StrictRotatingProvider`: an OAuth provider on the loopback interface; :mod:`tokenstore.testing.provider`.
* :class:`FakeClock`: a clock that the test moves.

For a backend; import each module by its own name:

* :mod:`tokenstore.testing.conformance`: conformance tests, as test classes to inherit from. It needs pytest.
* :mod:`tokenstore.testing.machine`: a Hypothesis state machine that compares a backend with the in-memory one.
* :mod:`tokenstore.testing.history`: a linearizability checker for recorded histories of concurrent calls.

``pip install "tokenstore[testing]"`` installs what they need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenstore.testing.clock import FakeClock
    from tokenstore.testing.provider import StrictRotatingProvider
    from tokenstore.testing.token_provider import SyncTokenProvider, TokenProvider
else:
    _HOMES = {
        "FakeClock": "clock",
        "StrictRotatingProvider": "provider",
        "SyncTokenProvider": "token_provider",
        "TokenProvider": "token_provider",
    }

    def __getattr__(name: str) -> object:
        # Imported when they are used: pytest imports this package with the plugin, in every project.
        from importlib import import_module

        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


__all__ = ["FakeClock", "StrictRotatingProvider", "SyncTokenProvider", "TokenProvider"]
