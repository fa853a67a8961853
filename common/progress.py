"""Progress bars, and lines printed above or below them."""

import sys

from tqdm import tqdm


def say(line: str) -> None:
    """Print a line to stderr, above the bars."""
    tqdm.write(line, file=sys.stderr)


def long_bar(title: str, total: int, done: int, unit: str = "step") -> tqdm:
    """A bar for minutes to days: in a log file it has a line every ten seconds."""
    return tqdm(
        desc=title,
        total=total,
        initial=done,
        unit=unit,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )


def close_bars() -> None:
    """End the line of every bar that is shown, so that an error begins on a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
