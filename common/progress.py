"""Progress bars, and lines printed above or below them."""

import sys

from tqdm import tqdm


def say(line: str) -> None:
    """Print a line to stderr, above the bars."""
    tqdm.write(line, file=sys.stderr)


def close_bars() -> None:
    """End the line of every bar that is shown, so that an error begins on a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
