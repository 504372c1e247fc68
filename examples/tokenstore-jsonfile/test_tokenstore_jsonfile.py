"""The whole test of the backend."""

from pathlib import Path

from tokenstore.testing.conformance import BackendConformance


class TestJsonFile(BackendConformance):
    """What every backend must do."""

    def make_url(self, tmp_path: Path) -> str:
        """Where there is nothing yet."""
        return f"jsonfile:///{tmp_path}/tokens.json"
