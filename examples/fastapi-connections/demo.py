"""Runs the application with a provider on this machine, until Ctrl-C.

    python examples/fastapi-connections/demo.py

The provider asks nothing: it logs in the account whose name you type, and "alice" if you type none. Its access tokens
live two minutes, so the application refreshes them every minute in which it uses them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import uvicorn

from tokenstore import generate_key
from tokenstore.testing import StrictRotatingProvider


def main() -> None:
    """Start both."""
    parser = argparse.ArgumentParser(description="Runs the application with a provider on this machine.")
    parser.add_argument("--port", type=int, default=8000, help="the application's port (default: 8000)")
    port = parser.parse_args().port
    url = f"http://127.0.0.1:{port}"
    with (
        tempfile.TemporaryDirectory() as folder,
        StrictRotatingProvider(redirect_uris=[f"{url}/callback"], access_token_lifetime=120) as provider,
    ):
        provider.user = "alice"
        os.environ |= {
            "PUBLIC_URL": url,
            "TOKENSTORE_URL": f"sqlite:///{folder}/tokens.db",
            "CLIENT_ID": provider.client_id,
            "CLIENT_SECRET": provider.client_secret,
            "AUTHORIZE_URL": provider.authorize_url,
            "TOKEN_URL": provider.token_url,
            "REVOCATION_URL": provider.revocation_url,
            "API_URL": provider.resource_url,
            "TOKENSTORE_KEYS": generate_key(),  # a real application keeps its keys
        }
        print(f"Open {url} in a browser.", flush=True)
        uvicorn.run("app:app", app_dir=str(Path(__file__).parent), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
