"""Tables of cells, which are text."""

from collections.abc import Mapping, Sequence

from tabulate import tabulate


def as_markdown(rows: Sequence[Mapping[str, str]] | Sequence[Sequence[str]]) -> str:
    """As GitHub shows them. Rows are cells by column, or cells with the head first."""
    head = "keys" if isinstance(rows[0], Mapping) else "firstrow"
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """For a terminal: all columns but the first are flush right."""
    align = ("left", *("right" for _ in rows[0][1:]))
    return tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=align)
