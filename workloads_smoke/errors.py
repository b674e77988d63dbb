"""The one exception that the command line shows without a traceback."""


class UserError(Exception):
    """Something the caller of a command can mend: a flag, a path, a file's contents.

    The message names what was given, the rule it breaks and the remedy. `run.py` prints it as one
    line and exits with status 1; every other exception keeps its traceback.
    """
