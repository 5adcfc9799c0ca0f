"""The one error a user is meant to read."""


class UserError(ValueError):
    """A mistake of the user's: one line that says what, where and the remedy (exit code 2).

    It lives in the lowest layer because every layer raises it.
    """
