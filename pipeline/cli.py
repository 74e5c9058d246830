"""The task boundary: the only place that prints a failure and ends the program."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from invoke.exceptions import ParseError
from invoke.parser.argument import Argument
from invoke.tasks import Task, task

from pipeline import progress, settings
from pipeline.errors import BuildError
from pipeline.store import MORE_SPACE

# The flags that many tasks share: keyword, default, help.
FLAGS: dict[str, tuple[Any, str]] = {
    "offline": (False, "use only what the store holds; never open a connection"),
    "locked": (False, "fail when a pinned source is gone, instead of using the newest of its series"),
    "dry_run": (False, "say what would be done, and do nothing"),
    "keep": (False, "leave a failed machine running, with its console log and ssh line"),
}
_ALWAYS: dict[str, tuple[Any, str]] = {
    "debug": (False, "show every command, and a traceback where something fails"),
    "progress_form": ("auto", "auto, plain or json (one JSON object a line)"),
}


class _Argument(Argument):
    """One whose value may be no number: invoke itself shows a traceback then."""

    def set_value(self, value: Any, cast: bool = True) -> None:
        try:
            super().set_value(value, cast)
        except ValueError:
            option = str(self.name).replace("_", "-")
            raise ParseError(
                f"--{option} takes a whole number, not {value!r}\n  → the same command with another value"
            ) from None


class _Task(Task[Any]):
    def get_arguments(self, ignore_unknown_help: bool | None = None) -> list[Argument]:
        """As invoke's own, with a clear error for what is no number."""
        found = super().get_arguments(ignore_unknown_help)
        for argument in found:
            argument.__class__ = _Argument
        return found


def command(*flags: str, help: dict[str, str] | None = None, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a function an invoke task behind the boundary.

    Args:
        flags: which of `FLAGS` the task takes; they reach `pipeline.settings.current`, not the function. One that is a
            parameter of the function reaches the function alone.
        help: per parameter of the function.
        options: for `invoke.task` (name, aliases, positional, iterable).
    """

    def decorate(function: Callable[..., Any]) -> Any:
        signature = inspect.signature(function)
        shared = {**{name: FLAGS[name] for name in flags}, **_ALWAYS}
        # A task may mean something of its own by a shared name (--debug: a debug kernel); then it gets the flag itself.
        shared = {name: flag for name, flag in shared.items() if name not in signature.parameters}
        body = boundary(function)

        @functools.wraps(function)
        def wrapped(context: Any, *args: Any, **kwargs: Any) -> Any:
            asked = {name: kwargs.pop(name) for name in shared}
            progress.configure(str(asked.pop("progress_form")), debug=bool(asked.pop("debug", False)))
            for name, value in asked.items():
                setattr(settings.current, name, value)
            os.chdir(settings.TOP)
            return body(context, *args, **kwargs)

        extra = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, (default, _) in shared.items()
        ]
        wrapped.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), *extra]
        )
        texts = {name: text for name, (_, text) in shared.items()}
        return task(klass=_Task, help={**(help or {}), **texts}, auto_shortflags=False, **options)(wrapped)

    return decorate


def goes_with(other: str, there: object, **given: object) -> None:
    """Refuse options that would be passed over.

    Args:
        other: the option that they go with.
        there: its value; an empty one is as good as none.
        given: the options with their values.

    Raises:
        BuildError: one has a value, and the other option has none.
    """
    for name, value in given.items():
        if value and not there:
            option = name.replace("_", "-")
            raise BuildError(
                f"--{option} goes with --{other} only", f"the same command with --{other}, or without --{option}"
            )


def boundary(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a task: errors become text with a next step, work done is summed up at the end."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
        except BuildError as error:
            if progress.debugging():
                traceback.print_exc()
            fail(error)
        except OSError as error:
            if progress.debugging():
                raise
            fail(_from_os(error))
        except KeyboardInterrupt:
            fail(BuildError("interrupted", "the same command goes on where it stopped"), status=130)
        if progress.worked():
            progress.table()
        return result

    return wrapped


def fail(error: BuildError, status: int = 1) -> NoReturn:
    """Print an error and end."""
    progress.error(str(error))
    sys.exit(status)


def _from_os(error: OSError) -> BuildError:
    place = error.filename or "the system"
    if error.errno == 28:
        return BuildError(f"{place}: the disk is full", MORE_SPACE)
    return BuildError(f"{place}: {error.strerror or error}", "the same command with --debug shows where")
