"""The command line: ``python -m benchmarks [URL …]``, ``… compare A B``, ``… show FILE`` and ``… plot FILE DIR``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.settings import DEFAULT, QUICK, WORKLOADS, Settings

__all__ = ["main"]

_RUN = """\
Without a URL, this measures SQLite in a temporary folder, and the private servers that the tests start. A URL can be
any that tokenstore accepts. The program creates tables with random names and drops them at the end. There are more
commands, each with --help: `compare BEFORE.json AFTER.json`, `show FILE.json` and `plot FILE.json FOLDER`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name, and exit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        import rich  # noqa: F401
    except ImportError:
        sys.exit('printing the tables needs rich: pip install "tokenstore[cli]"')
    commands = {"compare": _compare, "show": _show, "plot": _plot}
    command = commands.get(words[0]) if words else None
    sys.exit(_run(words) if command is None else command(words[1:]))


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"python -m benchmarks{name}", description=description)


def _read(*paths: Path) -> list[Any]:
    from benchmarks.results import Results, ResultsError

    try:
        return [Results.read(path) for path in paths]
    except ResultsError as error:
        sys.exit(str(error))


def _compare(words: Sequence[str]) -> int:
    from benchmarks import compare
    from benchmarks.report import console

    parser = _parser(
        " compare", "Compare two runs. The exit code is 1 if anything became slower by more than the noise."
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--tolerance",
        type=float,
        default=compare.TOLERANCE,
        help="smaller changes are ignored, as a fraction (default: %(default)s)",
    )
    chosen = parser.parse_args(words)
    before, after = _read(chosen.before, chosen.after)
    return 0 if compare.compare(before, after, console(), chosen.tolerance) else 1


def _show(words: Sequence[str]) -> int:
    from benchmarks.report import console, report

    parser = _parser(" show", "Print the tables of a run.")
    parser.add_argument("file", type=Path)
    [results] = _read(parser.parse_args(words).file)
    report(results, console())
    return 0


def _plot(words: Sequence[str]) -> int:
    parser = _parser(" plot", "Draw the plots of a run, as SVG and PNG.")
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args(words)
    [results] = _read(chosen.file)
    return _draw(results, chosen.folder)


def _draw(results: Any, folder: Path) -> int:
    try:
        from benchmarks.plots import draw
    except ImportError:
        print('plots need matplotlib: pip install "tokenstore[bench]"', file=sys.stderr)
        return 2
    for path in draw(results, folder):
        print(path)
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(sorted({_positive(part) for part in text.split(",")}))
    if not numbers:
        raise argparse.ArgumentTypeError("expected numbers, separated by commas")
    return numbers


def _positive(text: str) -> int:
    try:
        number = int(text.replace("_", ""))
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return number


def _run_parser() -> argparse.ArgumentParser:
    parser = _parser("", _RUN)
    add = parser.add_argument
    add("urls", nargs="*", metavar="URL")
    add("--workload", choices=WORKLOADS, action="append", dest="workloads", help="may be repeated; default: all")
    add("--callers", type=_numbers, help="concurrent callers in each process, e.g. 1,8,32,256")
    add("--processes", type=int, choices=range(1, 5), help="number of calling processes; their rates are added")
    add("--rows", type=_positive, help="rows of the table")
    add("--most-rows", type=_positive, help="rows of the largest table, for `rows` and `list`")
    add("--rounds", type=_positive, help="number of rounds; each contender is measured once in a round")
    add("--seconds", type=float, help="seconds for which a contender is measured in a round")
    add("--loop", choices=("asyncio", "uvloop", "both"), help="event loop")
    add("--pool-size", type=_positive, help="maximum connections of each pool")
    add("--no-peers", action="store_const", const=False, dest="peers", help="do not measure other libraries")
    add("--quick", action="store_true", help="a short run that tests the program; its figures are not meaningful")
    add("--json", type=Path, metavar="FILE", help="write the numbers of all rounds to this file")
    add("--plots", type=Path, metavar="FOLDER", help="draw plots into this folder")
    return parser


def _settings(chosen: argparse.Namespace) -> Settings:
    settings = QUICK if chosen.quick else DEFAULT
    names = ("workloads", "callers", "processes", "rows", "most_rows", "rounds", "seconds", "pool_size", "peers")
    given = {name: getattr(chosen, name) for name in names if getattr(chosen, name) is not None}
    if chosen.loop:
        given["loops"] = ("asyncio", "uvloop") if chosen.loop == "both" else (chosen.loop,)
    return replace(settings, **given)


def _run(words: Sequence[str]) -> int:
    chosen = _run_parser().parse_args(words)
    settings = _settings(chosen)

    from benchmarks.databases import databases, private_urls
    from benchmarks.report import console, report
    from benchmarks.results import Results, environment
    from benchmarks.run import Run
    from benchmarks.workers import WorkerError, loop_factory

    for loop in settings.loops:
        try:
            loop_factory(loop)
        except ImportError:
            sys.exit(f'{loop} is not installed: pip install "tokenstore[bench]"')
    results = Results({}, settings.as_json())
    failure = ""
    progress = console(stderr=True)
    with ExitStack() as stack:
        needed = {*settings.workloads} - {"seal", "import"}
        urls = chosen.urls
        if needed and not urls:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            urls = private_urls(folder)
        found = databases(urls) if needed else []
        status = stack.enter_context(progress.status("starting"))
        run = Run(settings, results, status.update)
        try:
            for database in found:
                for loop in settings.loops:
                    run.database(database, loop)
            if "seal" in settings.workloads:
                run.seal()
            if "import" in settings.workloads:
                run.imports()
        except WorkerError as error:
            failure = str(error)
        except KeyboardInterrupt:
            failure = "interrupted"
        results.environment = environment(run.servers)
    report(results, console())
    for name, problem in run.missing.items():
        print(f"not measured: {name}: {problem}")
    if chosen.json:
        results.write(chosen.json)
    if failure:
        print(f"the run ended early, so results are incomplete: {failure}", file=sys.stderr)
        return 2
    return _draw(results, chosen.plots) if chosen.plots else 0
