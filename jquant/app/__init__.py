"""The command line."""

from jquant.errors import extra

with extra("cli"):  # told here, before one of many modules fails
    import cyclopts  # noqa: F401
    import rich  # noqa: F401
