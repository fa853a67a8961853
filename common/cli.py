"""What the command-line tools share: errors in one line, and what terminals and shells need."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from rsa_detectron2.common.errors import REQUEUE, InputError, Interrupted, one_line
from rsa_detectron2.common.progress import close_bars


def expand_home(argument: str) -> str:
    """Expand ``~`` where a shell does not: in quotes, and in --option=~/folder."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return option + equals + os.path.expanduser(value)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call ``main`` and exit. An error that a user can fix ends in one line on stderr and status 2, a signal
    to stop in one line of the first process and status REQUEUE."""
    sys.argv[1:] = map(expand_home, sys.argv[1:])
    # A file's name may not be UTF-8, and a terminal may not show all of UTF-8.
    sys.stdout.reconfigure(errors="backslashreplace")
    os.environ.setdefault("PYTHONIOENCODING", ":backslashreplace")  # for child processes
    try:
        sys.exit(main())
    except (InputError, OSError, MemoryError) as error:
        say_last(f"error: {one_line(error)}")
        sys.exit(2)
    except Interrupted as interruption:
        if int(os.environ.get("RANK", 0)) == 0:
            say_last(interruption)
        sys.exit(REQUEUE)
    except KeyboardInterrupt:
        say_last("interrupted")
        sys.exit(130)


def say_last(line: str | Exception) -> None:
    """Print a last line to stderr, below the progress bars. The terminal may have been closed."""
    with contextlib.suppress(OSError):
        close_bars()
        print(line, file=sys.stderr)
