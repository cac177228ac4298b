"""The errors that SCX raises, each with one line that says what to do.

They derive from RuntimeError and not from ValueError: vLLM builds its
configuration with pydantic, which catches ValueError and AssertionError and
buries their text in a report of its own.
"""


class SCXError(RuntimeError):
    """Any error of this package."""


class SCXConfigError(SCXError):
    """A variable has a value that is not allowed, or changed too late."""


class SCXUnsupportedError(SCXError):
    """Encoding was asked for, but this package cannot provide it."""


class SCXNotEncodedError(SCXError):
    """A layer that had to be encoded ran without its secure device."""


class SCXSecureDeviceError(SCXError):
    """A secure device has ended, or was asked for what it cannot do."""
