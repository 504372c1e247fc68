"""A griffe extension that shows the project's docstrings as Markdown.

Docstrings name Python objects with Sphinx's roles, such as ``:class:`AuthTokenStore```, and begin code blocks with
``::``. mkdocstrings reads Markdown, where both would be shown as they are.
"""

from __future__ import annotations

import re
import sys
from html import escape
from typing import Any

import griffe

__all__ = ["RolesExtension"]

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(~?)([\w.]+)`")
_LITERAL = re.compile(r"(?m)(?<=\S)::$|^[ \t]*::\n")


class RolesExtension(griffe.Extension):
    """Replaces roles by cross-references."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Change all docstrings of a package once its modules are loaded."""
        for module in _modules(pkg):
            for scope in _objects(module):
                if scope.docstring is not None:
                    scope.docstring.value = _markdown(scope.docstring.value, scope, loader.modules_collection)


def _modules(module: griffe.Module) -> list[griffe.Module]:
    below = [member for member in module.modules.values() if isinstance(member, griffe.Module)]
    return [module, *(found for member in below for found in _modules(member))]


def _objects(scope: griffe.Object) -> list[griffe.Object]:
    members = [member for member in scope.members.values() if isinstance(member, griffe.Object)]
    members = [member for member in members if not member.is_module]
    return [scope, *(found for member in members for found in _objects(member))]


def _markdown(text: str, scope: griffe.Object, known: griffe.ModulesCollection) -> str:
    def reference(match: re.Match[str]) -> str:
        short, name = match.groups()
        shown = f"<code>{escape(name.rpartition('.')[2] if short else name)}</code>"
        if (path := _resolved(name, scope, known)) is not None:
            # Optional: what the reference does not show, such as a private module, is shown without a link.
            return f'<autoref identifier="{escape(path)}" optional>{shown}</autoref>'
        if name.partition(".")[0] in sys.stdlib_module_names:
            return shown
        # No object has this name. The site's strict build fails with this reference.
        return f'<autoref identifier="{escape(name)}">{shown}</autoref>'

    return _ROLE.sub(reference, _LITERAL.sub(lambda match: ":" if match[0] == "::" else "", text))


def _resolved(name: str, scope: griffe.Object, known: griffe.ModulesCollection) -> str | None:
    """Return the path of the object that a docstring of ``scope`` means by ``name``, looking from the inside out."""
    first, *rest = name.split(".")
    holder: griffe.Object | None = scope
    while holder is not None:
        members = holder.all_members if holder.is_class else holder.members
        if first in members and (path := _member(members[first], rest)) is not None:
            return path
        holder = holder.parent
    if first in known.members:
        return name if _member(known.members[first], rest) is not None else None
    return None


def _member(found: griffe.Object | griffe.Alias, rest: list[str]) -> str | None:
    """Return the path of what ``rest`` names below an object, or None."""
    try:
        for part in rest:
            found = found.all_members[part]
        return found.canonical_path
    except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
        return None
