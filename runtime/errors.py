"""Errors that sessions share."""

from __future__ import annotations


class BackendUnavailableError(RuntimeError):
    """A backend cannot run on this machine, for a reason a person can act on (no driver, wrong GPU, not installed).

    Tables show it as a row with its reason; commands that need the backend report its text.
    """


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of an exception as one line of at most ``limit`` characters, or its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
