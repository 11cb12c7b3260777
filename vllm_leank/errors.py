"""The one kind of error that is the user's to fix."""


class UserError(ValueError):
    """Says what is wrong and what to do; command-line tools print it without a traceback."""
