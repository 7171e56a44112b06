"""The base class of all errors that a user can cause. Each module declares its own kinds beside what raises them."""


class HyperlmError(Exception):
    """What a user can cause, and mend: never what is wrong in the program itself.

    `str(error)` is one line: what is wrong, why, and what to do. `cli.run` prints it, and ends the process with `exit_code`.
    """

    exit_code = 2
