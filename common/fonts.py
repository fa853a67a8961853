"""Texts of users in pictures, drawn as they are and in fonts that have their characters."""

import contextlib
import functools
import sys
import warnings
from collections.abc import Iterator

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

DEJAVU = "DejaVu Sans"  # matplotlib's own font


@contextlib.contextmanager
def literal_text(*texts: str) -> Iterator[None]:
    """Let matplotlib draw texts of users as they are: "$" begins no formula, and what its own font lacks,
    Chinese for one, comes from the fonts that are installed. What no font has is told once, on stderr."""
    families, missing = fonts_for(frozenset("".join(texts)))
    if missing:
        tell_once(
            f"no installed font has {missing[:20]}: pictures show boxes instead (for Chinese, Japanese and "
            "Korean, install fonts-noto-cjk)"
        )
    options = {"text.parse_math": False, "font.family": [DEJAVU, *families]}
    with matplotlib.rc_context(options), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # once for every label
        yield


@functools.cache
def fonts_for(characters: frozenset[str]) -> tuple[list[str], str]:
    """Characters -> (names of installed fonts that have what matplotlib's own lacks, those that none has)."""

    def lacking(path: str, wanted: set[str]) -> set[str]:
        return {c for c in wanted if ord(c) not in FT2Font(path).get_charmap()}

    missing = lacking(font_manager.findfont(DEJAVU), {c for c in characters if c.isprintable()})
    families = []
    for path in sorted(font_manager.findSystemFonts()) if missing else ():
        try:
            font = FT2Font(path)
            rest = lacking(path, missing) if font.scalable else missing
        except Exception:  # fonts of kinds that matplotlib cannot draw
            continue
        if rest < missing:
            font_manager.fontManager.addfont(path)  # its list is of the fonts at matplotlib's first start
            families.append(font_manager.FontProperties(fname=path).get_name())
            missing = rest
    return families, "".join(sorted(missing))


@functools.cache
def tell_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
