"""The complete test of the backend."""

import secrets
from pathlib import Path

from tokenstore.registry import backend_for_url
from tokenstore.testing.conformance import BackendConformance
from tokenstore.testing.machine import check_agreement


class TestJsonFile(BackendConformance):
    """The tests that every backend must pass."""

    def make_url(self, tmp_path: Path) -> str:
        """Return the URL of a file that does not exist yet."""
        return f"jsonfile:///{tmp_path}/tokens.json"


def test_agreement(tmp_path: Path) -> None:
    """Hypothesis finds no sequence of operations after which this backend and the memory backend differ."""
    check_agreement(lambda: backend_for_url(f"jsonfile:///{tmp_path}/{secrets.token_hex(8)}.json?sync=false", {}))
