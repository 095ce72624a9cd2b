"""The `lora-kit` command. Each command's module is imported only when it runs: `--help` imports no torch."""

from __future__ import annotations

import atexit
import gc
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from lora_kit.cli.help_groups import grouped
from lora_kit.errors import LoraKitError

COMMANDS = {
    "train": "Train what a recipe says.",
    "plan": "Show what a recipe would train; loads no weights.",
    "cache": "Encode what a recipe trains on ahead of time; verify, prune.",
    "generate": "Draw prompts with a base and any number of scaled adapters.",
    "grid": "Draw strength × prompt × seed as one labelled picture.",
    "merge": "Merge adapters into a base's weights, and verify the result.",
    "convert": "Write an adapter in another layout: kohya, diffusers or PEFT.",
    "combine": "Write several adapters as one, exactly or at a lower rank.",
    "resize": "Cut an adapter to a rank or to a share of its energy.",
    "extract": "Write the difference of two bases as an adapter.",
    "inspect": "Show what is in an adapter file.",
    "diff": "Compare two adapters module by module.",
    "schema": "Print the recipe's JSON schema, for editors.",
}
"""Name of each command, which is also its module's in this package, and its line in `lora-kit --help`."""


class _LazyGroup(TyperGroup):
    """Knows all commands by name and help line; reads a command's own module when it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that `args` begin with."""
        if args and args[0] in COMMANDS:
            self.add_command(_load(args[0]), args[0])
        return super().resolve_command(ctx, args)


def _load(name: str) -> Any:
    # Plain help everywhere: rich's takes as long to import as all the rest.
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    module = importlib.import_module(f"lora_kit.cli.{name}")
    groups = getattr(module, "HELP_GROUPS", None)
    app.command(name, cls=grouped(groups) if groups else None)(module.command)
    return typer.main.get_command(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        # Here, not above: the help does without this import.
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("lora_kit")
        except PackageNotFoundError:
            number = "(run from its source, not installed)"
        typer.echo(f"lora-kit {number}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
    ),
) -> None:
    """Train, scale, merge and compare LoRA adapters for Stable Diffusion."""


def _placeholder() -> None:
    """Stands for a command in the list of commands."""


def build_command() -> Any:
    """The whole command line as one callable command."""
    app = typer.Typer(
        cls=_LazyGroup,
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, line in COMMANDS.items():
        app.command(name, help=line)(_placeholder)
    return typer.main.get_command(app)


def silence_libraries() -> None:
    """Keep libraries' advice to their own developers out of the user's terminal; a user's own setting stays.

    transformers and diffusers set their loggers' levels on import, from these variables. bitsandbytes warns at
    import about a kernel for 4-bit inference on a CPU, which nothing here uses.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _process_name() -> str:
    """Which process of a launch says it, where it is not the main one."""
    rank = os.environ.get("RANK", "0")
    return f"process {rank} of {os.environ.get('WORLD_SIZE', '?')}: " if rank != "0" else ""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 2 the user's input was wrong, 130 after Ctrl-C, 1 anything else.

    arguments: what follows the program's name. Default: this process's own.
    """
    silence_libraries()
    # Last of all that runs at exit: the interpreter's own collections then find nothing to look through, which in some
    # 3,000 modules takes it up to a second.
    atexit.register(gc.freeze)
    try:
        build_command()(args=None if arguments is None else list(arguments), prog_name="lora-kit")
    except LoraKitError as error:
        sys.stderr.write(f"error: {_process_name()}{error}\n")
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
