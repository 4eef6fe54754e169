"""The one error that the command line answers with a line and exit status 2."""


class InputError(ValueError):
    """Something from outside cannot be used: says what, where, and what to do, in one line."""
