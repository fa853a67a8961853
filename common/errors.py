"""Errors that a user can fix, and their messages: one line each."""


class InputError(ValueError):
    """An error that the user can fix. Its message is one line that names the file or key and the fix."""


class Interrupted(Exception):
    """A signal asked the run to stop; everything up to the last step is saved. A tool then exits with
    REQUEUE."""


REQUEUE = 75  # EX_TEMPFAIL, which schedulers take for: run the same command again


def one_line(error: BaseException) -> str:
    """The message of an exception, on one line."""
    return " ".join(str(error).split()) or (
        "out of memory" if isinstance(error, MemoryError) else type(error).__name__
    )


# What torch's allocator says, and what cuDNN and cuBLAS say where their workspace no longer fits.
OUT_OF_MEMORY = (
    "out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "unable to find an engine",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch's most likely means that the GPU's memory is full."""
    return any(words in str(error) for words in OUT_OF_MEMORY)
