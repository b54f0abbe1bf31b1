"""The one exception that is shown to a user as a single line instead of a traceback."""


class UserError(ValueError):
    """Bad input. The message says what is wrong, where (file, key, flag, shapes) and what to do."""
