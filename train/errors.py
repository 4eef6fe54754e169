"""The one error that the command line answers with a line and exit status 2; others in a line."""


class InputError(ValueError):
    """Something from outside cannot be used: says what, where, and what to do, in one line."""


def first_line(error: BaseException) -> str:
    r"""The first line of what an error says, or its kind where it says nothing.

    >>> first_line(ValueError("no such file\nhint: look elsewhere")), first_line(KeyError())
    ('no such file', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
