"""What the user can do something about: problems with a place and a remedy, printed in one place."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, where (``file:line``) and what to do about it."""

    message: str
    where: str = ""
    hint: str = ""


class EdgetuneError(Exception):
    """Something the user can fix (exit code 1). Carries every problem that was found, not the first one."""

    exit_code = 1

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(problem.message for problem in self.problems))

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[Problem, ...]]]:
        """Let it travel between processes with its problems."""
        return type(self), (self.problems,)


class GateError(EdgetuneError):
    """A quality gate said no (exit code 3): the result is there, and is not what it ought to be."""

    exit_code = 3


def failure(message: str, *, where: str = "", hint: str = "") -> EdgetuneError:
    """Make the error for a single problem."""
    return EdgetuneError([Problem(message, where, hint)])


def refuse(problems: Iterable[Problem]) -> None:
    """Raise EdgetuneError when there are problems."""
    if found := tuple(problems):
        raise EdgetuneError(found)


def first_line(error: Exception) -> str:
    """Return the first line that a library's error says, or its type when it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def missing_extra(extra: str, cause: ImportError) -> EdgetuneError:
    """Make the error for a package that only an extra of edgetune brings in."""
    return failure(
        f"the package {cause.name!r} is not installed" if cause.name else f"a package cannot be loaded: {cause}",
        hint=f"run `make setup` in the project, or install edgetune's extra {extra!r}",
    )


class TerminatedError(KeyboardInterrupt):
    """The program was told to end: unlike Ctrl-C, nothing may go on after this."""
