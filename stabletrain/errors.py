"""The one class of errors that are a user's mistake: shown as one message, without a traceback."""


class UserError(ValueError):
    """Something the user can put right: the message says what, what was expected, what was got, and what to do."""
