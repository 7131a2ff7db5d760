"""Options made of the settings, so that a setting is written once, in `settings.py`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import typer

from ..settings import ABOUT


def option(
    name: str,
    help: str,
    default: Any = None,
    *flags: str,
    kind: Any = str,
    shown: Any = None,
    argument: bool = False,
    required: bool = False,
    **more: Any,
) -> inspect.Parameter:
    """Returns a parameter of a command.

    default: None if the command is to know that the user left the option out. flags: if not those of the
    name. kind: the type; list for texts that may be repeated. shown: the default in words. argument: it has
    a place and no flag. more: what typer knows besides.
    """
    shown = default if shown is None else shown
    said = shown is not None and shown is not False and shown != "" and not required
    text = help if not said else f"{help} (default: {shown})"
    make: Any = typer.Argument if argument else typer.Option
    info = make(... if required else default, *flags, help=text, show_default=False, **more)
    annotation = list[str] if kind is list else kind
    if default is None and not required:
        annotation = annotation | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=annotation)


def setting(name: str, default: Any = None, **more: Any) -> inspect.Parameter:
    """Returns the option for a setting; the prompt is an argument. default: this command's own."""
    about = ABOUT[name]
    shown = about.shown if default is None else default
    more["argument"] = name == "prompt"
    return option(name, about.help, default, kind=about.kind, shown=shown, **more)


def takes(*parameters: inspect.Parameter) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds parameters to a command. Those that have a value reach it as a dict, its first argument."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        def run(**values: Any) -> Any:
            given = {one.name: values.pop(one.name) for one in parameters}
            return command(
                {name: value for name, value in given.items() if value not in (None, [])}, **values
            )

        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        own = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
        run.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate
