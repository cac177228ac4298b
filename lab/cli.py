"""The command line of every script and benchmark here."""


class UsageError(Exception):
    """What was asked for cannot be done; the text is one line that says why."""
