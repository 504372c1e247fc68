"""``python -m tokenstore``: the command line."""

import sys

from tokenstore.cli import main

# Processes that the demo spawns import this module under another name.
if __name__ == "__main__":
    sys.exit(main())
