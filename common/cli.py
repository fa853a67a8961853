"""What the command-line tools share: errors as one line, and care for terminal and shell."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from rsa_detectron2.common.errors import InputError, one_line
from rsa_detectron2.common.progress import close_bars


def expand_home(argument: str) -> str:
    """``~`` as the home folder, where a shell leaves it: in quotes, and in --option=~/folder."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return option + equals + os.path.expanduser(value)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call ``main``. What a user can mend (InputError, OSError) ends as one line on stderr, status 2."""
    sys.argv[1:] = map(expand_home, sys.argv[1:])
    # A file's name need not be UTF-8, and the terminal may take less than that.
    sys.stdout.reconfigure(errors="backslashreplace")
    os.environ.setdefault("PYTHONIOENCODING", ":backslashreplace")  # of the processes that are started
    try:
        sys.exit(main())
    except (InputError, OSError, MemoryError) as error:
        say_last(f"error: {one_line(error)}")
        sys.exit(2)
    except KeyboardInterrupt:
        say_last("interrupted")
        sys.exit(130)


def say_last(line: str | Exception) -> None:
    """A last line on stderr, below the progress bars. The terminal may have been closed."""
    with contextlib.suppress(OSError):
        close_bars()
        print(line, file=sys.stderr)
