"""Ready-made parts that connect the store with other libraries; each names the extra that it needs."""

__all__: list[str] = []
