"""The application, how verbs are entered, and how they end."""

from __future__ import annotations

import functools
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any

import typer

try:
    from typer.exceptions import TyperException
except ImportError:  # before 0.29 typer stood on click, which Flower's typer still does
    from click import ClickException as TyperException

from .. import __version__
from .errors import in_flags

app = typer.Typer(
    name="sparse-peft",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MISTAKES = (ValueError, TypeError, OSError, ImportError)
"""What functions of this package raise where the one who calls them can mend it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 after an error that the user can mend, 2 after a wrong command."""
    before, warnings.formatwarning = warnings.formatwarning, _short_warning
    # peft 0.21 reads the old name of `is_activation_checkpointing`, which no user of a command can mend.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    try:
        status = app(args=arguments, prog_name="sparse-peft", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except TyperException as error:
        return _end_usage(error)
    except SystemExit as end:  # a closed pipe, or the completion of a shell
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        warnings.formatwarning = before


def verb(
    name: str,
    *,
    panel: str = "Commands",
    aliases: Mapping[str, str] | None = None,
    context_settings: dict[str, Any] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: enter a function as `sparse-peft NAME`, below `panel` in the help.

    Its parameters are annotated as typer has it, its docstring is the help; a parameter that is a dataclass stands for
    one of each field. An error that its user can mend ends the command with status 1 and one message, in words of
    flags; a wrong combination of flags is a `typer.BadParameter`, and ends it with 2. `aliases` are names of Python
    arguments in such errors, and the flags they have here; `context_settings` are typer's.
    """

    def enter(function: Callable[..., None]) -> Callable[..., None]:
        groups, parameters = _grouped(function)

        @functools.wraps(function)
        def run(**kwargs: Any) -> None:
            try:
                for parameter, kind in groups.items():
                    kwargs[parameter] = kind(**{field.name: kwargs.pop(field.name) for field in fields(kind)})
                function(**kwargs)
            except BrokenPipeError:
                raise
            except _MISTAKES as error:
                context = _context()
                if context is not None and context.find_root().params.get("traceback"):
                    traceback.print_exc()
                command = context.command if context is not None else None
                print(f"sparse-peft {name}: {in_flags(str(error), command, aliases)}", file=sys.stderr)
                raise typer.Exit(1) from error

        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        app.command(name, rich_help_panel=panel, context_settings=context_settings)(run)
        return run

    return enter


def _grouped(function: Callable[..., None]) -> tuple[dict[str, type], list[inspect.Parameter]]:
    """The parameters of a verb that are dataclasses, and all parameters with the fields of these in their place."""
    groups, parameters = {}, []
    for given in inspect.signature(function, eval_str=True).parameters.values():
        kind = given.annotation
        if not is_dataclass(kind):
            parameters.append(given.replace(kind=given.KEYWORD_ONLY))
            continue
        groups[given.name] = kind
        for one in inspect.signature(kind, eval_str=True).parameters.values():
            parameters.append(one.replace(kind=one.KEYWORD_ONLY))
    return groups, parameters


def _context() -> typer.Context | None:
    try:
        from typer._click.globals import (
            get_current_context,  # typer brings its own click, and has no public name for it
        )
    except ImportError:
        from click import get_current_context

    return get_current_context(silent=True)


def _end_usage(error: TyperException) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "sparse-peft"
    if message := error.format_message():  # without one the help was shown
        print(f"{path}: {message}\nTry '{path} --help'.", file=sys.stderr)
    return error.exit_code


def _short_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    return f"warning: {message}\n"


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"sparse-peft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="After an error, show where it was raised.")] = False,
) -> None:
    """Sparse and sparse + low-rank adapters: train them, look into them, take them elsewhere."""
