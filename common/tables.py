"""Tables of results: the mean ± standard deviation of seeds, Markdown and CSV."""

import csv
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

Mean = tuple[float, float | None]


def mean_std(values: Sequence[float | None]) -> Mean | None:
    """Mean and sample standard deviation over seeds.

    The deviation of a single value is None. If the value of any seed is missing, there is no mean.
    """
    if None in values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def cell(value: Mean | None) -> str:
    """The result of mean_std as text with one decimal."""
    if value is None:
        return "–"
    mean, std = value
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def to_markdown(cells: list[list[str]]) -> str:
    """A Markdown table of a header and rows.

    Columns are padded, so that the table also reads well as plain text. A row with nothing but a first cell
    may be wider than the table.
    """
    cells = [[text.replace("|", "\\|") for text in row] for row in cells]
    full = [row for row in cells if any(row[1:])]
    widths = [max(3, *map(len, column)) for column in zip(*(full or cells))]
    lines = []
    for row in cells:
        padded = (text.ljust(width) for text, width in zip(row, widths))
        lines.append("| " + " | ".join(padded) + " |")
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def write_rows(path: str | Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a CSV file in UTF-8, which escapes names that are not; None becomes an empty field."""
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
