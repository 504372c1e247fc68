"""Print the number of tests and the minutes of each environment: `summary.py TOX_RESULT_JSON SECONDS`."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

# The last line of pytest, such as "=== 1 failed, 20 passed, 3 skipped in 4.56s ===".
_COUNTS = re.compile(r"^=* ?(\d+ \w+(?:, \d+ \w+)*) in [\d.]+s.*$", re.MULTILINE)


def _main(results: str, seconds: str) -> None:
    total: Counter[str] = Counter()
    for name, environment in json.loads(Path(results).read_text())["testenvs"].items():
        if (result := environment.get("result")) is None:
            continue  # not asked for, or left out
        counts: Counter[str] = Counter()
        for command in environment.get("test", []):
            for line in _COUNTS.findall(re.sub(r"\x1b\[[\d;]*m", "", command["output"])):
                for number, outcome in re.findall(r"(\d+) (\w+)", line):
                    counts["failed" if outcome.startswith("error") else outcome] += int(number)
        total += counts
        outcome = "OK" if result["success"] else "FAILED"
        tests = f"{counts['passed']} passed, {counts['failed']} failed" if counts else ""
        sys.stdout.write(f"{name:14} {outcome:6} {result['duration'] / 60:5.1f} min  {tests}\n")
    sys.stdout.write(f"{'all':14} {'':6} {int(seconds) / 60:5.1f} min\n")
    sys.stdout.write(f"total: {total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
