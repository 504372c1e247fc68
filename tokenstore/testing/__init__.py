"""Shipped tools for tests: of an application that keeps tokens, and of a backend.

* :mod:`tokenstore.testing.conformance`: what every backend must do, as test classes to inherit from.
* :mod:`tokenstore.testing.machine`: a Hypothesis state machine that holds a backend against the in-memory one.
* :mod:`tokenstore.testing.history`: a checker of concurrent histories.
* :mod:`tokenstore.testing.provider`: a strict OAuth token endpoint on loopback.

Import what you need from these modules; each has requirements of its own. The first two need pytest and Hypothesis:
``pip install "tokenstore[testing]"``.
"""

from __future__ import annotations

__all__: list[str] = []
