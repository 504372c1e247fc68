"""The complete test of the backend."""

from pathlib import Path

from tokenstore.testing.conformance import BackendConformance


class TestJsonFile(BackendConformance):
    """The tests that every backend must pass."""

    def make_url(self, tmp_path: Path) -> str:
        """Return the URL of a file that does not exist yet."""
        return f"jsonfile:///{tmp_path}/tokens.json"
