"""The one way to fail: a fact with its exact place, then the command to type next."""

from __future__ import annotations

from collections.abc import Sequence


class BuildError(Exception):
    """A failure that the user can act on.

    Only the task boundary (`pipeline.cli`) prints it and ends the program.

    Args:
        message: the fact, lower case, with its exact place (file, line, dotted path).
        hint: what to do next, if possible a command that can be typed as it stands.
        details: further lines, each a fact of its own (all problems of one input, a log's tail).
    """

    def __init__(self, message: str, hint: str, details: Sequence[str] = ()) -> None:
        if not hint:
            raise ValueError(f"a BuildError without a next step: {message}")
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = tuple(details)

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  {line}" for line in self.details), f"  → {self.hint}"])


class Problems:
    """Collects everything that is wrong with one input, so that it is refused whole and at once."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def add(self, path: str, text: str) -> None:
        """Note one problem at a dotted path (`directors[1].local_addresses[0]`) or `file:line`."""
        self._found.append(f"{path}: {text}" if path else text)

    def __bool__(self) -> bool:
        return bool(self._found)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def lines(self) -> tuple[str, ...]:
        """The problems in the order of their paths, each once."""
        return tuple(sorted(set(self._found)))

    def raise_if_any(self, title: str, hint: str) -> None:
        """Raise one `BuildError` that lists every problem.

        Raises:
            BuildError: when anything was added.
        """
        if self._found:
            count = len(self.lines)
            raise BuildError(f"{title}: {count} problem{'s' if count > 1 else ''}", hint, self.lines)
