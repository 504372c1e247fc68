"""Text from outside, such as a server's error message, for messages, logs and terminals."""

from __future__ import annotations

__all__ = ["escaped"]


def escaped(text: str) -> str:
    """The text with all characters escaped that could end a line, move a terminal's cursor or reverse the writing."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
