"""The one error that the command line answers with a line and exit status 2; others in a line."""

import sys


class InputError(ValueError):
    """Something from outside cannot be used: says what, where, and what to do, in one line."""


class Diverged(InputError):
    """A run's loss, scores or outputs were NaN or infinite, and it cannot go on."""


def warn(text: str) -> None:
    """Says what nobody should miss, even who asked for quiet."""
    print(f"warning: {text}", file=sys.stderr)


def first_line(error: BaseException) -> str:
    r"""The first line of what an error says, or its kind where it says nothing.

    >>> first_line(ValueError("no such file\nhint: look elsewhere")), first_line(KeyError())
    ('no such file', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
