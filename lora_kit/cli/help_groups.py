"""Plain help with options under headings. (rich's panels would cost its import, as long as all the rest.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand

OTHERS = "Options"
Groups = Mapping[str, Sequence[str]]
"""Heading → the names of its options, as the command's function has them."""


def grouped(groups: Groups) -> type[TyperCommand]:
    """A class of command whose help has these headings, in this order; what none names comes last."""

    class Grouped(TyperCommand):
        def format_options(self, ctx: Any, formatter: Any) -> None:
            """Write the arguments, and then every group that has options."""
            heading = {name: title for title, names in groups.items() for name in names}
            found: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Arguments", *groups, OTHERS)}
            for param in self.get_params(ctx):
                record = param.get_help_record(ctx)
                is_argument = param.param_type_name == "argument"
                if record is not None:
                    found["Arguments" if is_argument else heading.get(str(param.name), OTHERS)].append(record)
            for title, records in found.items():
                if records:
                    with formatter.section(title):
                        formatter.write_dl(records)

    return Grouped
