"""Statements of SQLAlchemy Core, compiled once for a driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, cast

from sqlalchemy import ARRAY, Executable, LargeBinary, Select
from sqlalchemy.engine.interfaces import Dialect as SQLAlchemyDialect
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.dml import UpdateBase

from tokenstore_sql.connections.connection import Parameters, StatementResult

__all__ = ["CompiledStatement", "Compiler"]


class CompiledStatement:
    """A statement as one driver takes it."""

    __slots__ = ("_constants", "_decoders", "_encoders", "_in_order", "returns_rows", "sql")

    def __init__(self, statement: Executable, dialect: SQLAlchemyDialect) -> None:
        compiled = cast(SQLCompiler, statement.compile(dialect=dialect))  # type: ignore[attr-defined]
        self.sql = str(compiled)
        self.returns_rows = isinstance(statement, Select) or (
            isinstance(statement, UpdateBase) and bool(statement.returning_column_descriptions)
        )
        names = compiled.positiontup if compiled.positiontup is not None else list(compiled.bind_names.values())
        self._in_order = None if compiled.positiontup is None else _in_order(names)
        self._constants: dict[str, Any] = {}
        self._encoders: list[tuple[str, Callable[[Any], Any]]] = []
        for name in dict.fromkeys(names):
            bind = compiled.binds[name]
            if not bind.required:
                self._constants[name] = bind.value
            # Drivers take bytes, and lists of values, as they are.
            if isinstance(bind.type, LargeBinary | ARRAY):
                continue
            if encode := bind.type.dialect_impl(dialect).bind_processor(dialect):
                self._encoders.append((name, encode))
        self._decoders: list[tuple[int, Callable[[Any], Any]]] = []
        for at, entry in enumerate(getattr(compiled, "_result_columns", ())):
            if decode := entry.type.dialect_impl(dialect).result_processor(dialect, None):
                self._decoders.append((at, decode))

    def arguments(self, parameters: Parameters) -> Any:
        """The parameters in the driver's order, or by the driver's names."""
        if self._constants or self._encoders:
            parameters = {**self._constants, **parameters}
            for name, encode in self._encoders:
                parameters[name] = encode(parameters[name])
        return parameters if self._in_order is None else self._in_order(parameters)

    def decoded(self, found: StatementResult) -> StatementResult:
        """The result as SQLAlchemy would return it."""
        if not self._decoders or not found.rows:
            return found
        columns = list(zip(*found.rows, strict=True))
        for at, decode in self._decoders:
            columns[at] = tuple(map(decode, columns[at]))
        return StatementResult(list(zip(*columns, strict=True)), found.changed)


def _in_order(names: Sequence[str]) -> Callable[[Parameters], Any]:
    if len(names) > 1:
        return itemgetter(*names)
    return lambda parameters: tuple(parameters[name] for name in names)


class Compiler:
    """Compiles each statement once for one driver.

    Args:
        dialect: SQLAlchemy's dialect for the driver. It must have seen the server, because some SQL depends on the
            server's version.
    """

    def __init__(self, dialect: SQLAlchemyDialect) -> None:
        self.dialect = dialect
        # By identity: a statement lives as long as its store, and its compiled form keeps it alive.
        self._compiled: dict[int, tuple[Executable, CompiledStatement]] = {}

    def __call__(self, statement: Executable) -> CompiledStatement:
        found = self._compiled.get(id(statement))
        if found is None:
            found = self._compiled[id(statement)] = (statement, CompiledStatement(statement, self.dialect))
        return found[1]
