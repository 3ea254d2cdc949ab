"""Registration of operators with libraries that are imported only when it is asked for."""

__all__: list[str] = []
