"""The task boundary: the only place that prints a failure and ends the program."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from pipeline import progress
from pipeline.errors import BuildError


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
        for line in progress.summary():
            print(line, file=sys.stderr)
        return result

    return wrapped


def fail(error: BuildError, status: int = 1) -> NoReturn:
    """Print an error and end."""
    progress.error(str(error))
    sys.exit(status)


def _from_os(error: OSError) -> BuildError:
    place = error.filename or "the system"
    if error.errno == 28:
        return BuildError(
            f"{place}: the disk is full", "invoke clean --store   (or set LVSFORGE_STORE to a larger disk)"
        )
    return BuildError(f"{place}: {error.strerror or error}", "the same command with --debug shows where")
