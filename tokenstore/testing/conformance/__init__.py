"""Conformance tests for backends, as test classes to inherit from. They need pytest, but no pytest plugin.

To test a backend, write a subclass that returns the URL of an empty store::

    from tokenstore.testing.conformance import BackendConformance


    class TestMine(BackendConformance):
        def make_url(self, tmp_path):
            return f"mine://{tmp_path}"

:class:`BackendConformance` is for every backend, :class:`RowLockConformance` for backends that have ``transaction()``,
:class:`ValueConformance` for backends that keep values. :class:`SharedBackendConformance` and
:class:`ProcessConformance` are for backends whose data several processes can open.
"""

from __future__ import annotations

from tokenstore.errors import MissingDependencyError

try:
    import pytest  # noqa: F401 - the modules below need it
except ImportError:
    raise MissingDependencyError(
        'tokenstore.testing.conformance needs pytest: pip install "tokenstore[testing]"'
    ) from None

from tokenstore.testing.conformance._concurrency import ConcurrencyTests
from tokenstore.testing.conformance._due import DueTests
from tokenstore.testing.conformance._empty_rows import EmptyRowTests
from tokenstore.testing.conformance._helpers import sealed
from tokenstore.testing.conformance._leases import LeaseTests
from tokenstore.testing.conformance._metadata import MetadataTests
from tokenstore.testing.conformance._processes import ProcessConformance
from tokenstore.testing.conformance._row_locks import RowLockConformance
from tokenstore.testing.conformance._rows import RowTests
from tokenstore.testing.conformance._setup import SetupTests
from tokenstore.testing.conformance._shared import SharedBackendConformance
from tokenstore.testing.conformance._testbed import Testbed
from tokenstore.testing.conformance._values import ValueConformance

__all__ = [
    "BackendConformance",
    "ProcessConformance",
    "RowLockConformance",
    "SharedBackendConformance",
    "Testbed",
    "ValueConformance",
    "sealed",
]


# pytest runs the tests of the last class first: in the order in which a backend is best written.
class BackendConformance(ConcurrencyTests, DueTests, EmptyRowTests, MetadataTests, LeaseTests, RowTests, SetupTests):
    """The tests of :class:`tokenstore.protocol.Backend`."""
