"""Ready-made refreshers, and what other libraries need. Each module's docstring names the extra that it needs."""

__all__: list[str] = []
