"""Ready-made refreshers. Each module's docstring names the extra that it needs."""

__all__: list[str] = []
