"""Tools for the tests of a backend, and of an application that uses tokenstore.

* :mod:`tokenstore.testing.conformance`: conformance tests for a backend, as test classes to inherit from.
* :mod:`tokenstore.testing.machine`: a Hypothesis state machine that compares a backend with the in-memory one.
* :mod:`tokenstore.testing.history`: a linearizability checker for recorded histories of concurrent calls.
* :mod:`tokenstore.testing.provider`: a strict OAuth token endpoint on the loopback interface.

Import each module by its own name. The first one needs pytest and the second one Hypothesis:
``pip install "tokenstore[testing]"``.
"""

from __future__ import annotations

__all__: list[str] = []
