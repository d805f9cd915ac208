"""The one exception that bad input raises."""


class InputError(ValueError):
    """The user's input cannot be used.

    The message is one line: what was expected, what came, what to do. The command line prints it
    and exits with code 2; in Python it is an ordinary ``ValueError``.
    """
