"""Errors that a user can fix, and their messages: one line each."""


class InputError(ValueError):
    """An error that the user can fix. Its message is one line that names the file or key and the fix."""


class Interrupted(Exception):
    """A signal asked the run to stop; everything up to the last step is saved."""


def one_line(error: BaseException) -> str:
    """The message of an exception, on one line."""
    return " ".join(str(error).split()) or (
        "out of memory" if isinstance(error, MemoryError) else type(error).__name__
    )
