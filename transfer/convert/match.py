"""Which row of formats.py a file fits: the names that a row knows, looked up in the file's state dicts."""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rsa_detectron2.transfer.convert import architectures
from rsa_detectron2.transfer.convert.formats import (
    AVERAGES,
    CONTAINERS,
    IGNORED,
    INNER_WRAPPERS,
    WRAPPERS,
    Format,
)


@dataclass
class Match:
    """What a row finds at one of its places.

    ``found``: {torchvision name: stored value} of the backbone of ``branch``. ``left_over``: the names that
    neither belong to it nor are dropped. ``missing``: the names that the nearest architecture has besides.
    """

    layout: Format
    branch: str
    container: str
    prefix: str
    found: dict
    left_over: list

    def __post_init__(self):
        self.architecture = architectures.nearest(self.found)
        shapes = architectures.tensor_shapes(self.architecture)
        self.missing = [self.prefix + name for name in shapes if name not in self.found]
        self.left_over += [self.prefix + name for name in self.found if name not in shapes]

    @property
    def place(self) -> str:
        return "/".join(filter(None, (self.container, self.prefix)))

    def whole(self) -> bool:
        return not self.missing and not self.left_over

    def partial(self) -> bool:
        """Whether most of a network is there."""
        return 2 * len(self.missing) < len(architectures.tensor_shapes(self.architecture))


def places(layout: Format) -> Iterator[tuple[str, str | None, str]]:
    """(branch, container, prefix) of each place; container None: each of :data:`CONTAINERS`."""
    for branch, names in (("online", layout.online), ("target", layout.target)):
        for place in names.split(" ") if names is not None else ():
            container, slash, prefix = place.rpartition("/")
            yield branch, container if slash else None, prefix
            if not slash and layout.target is None:
                yield from (("target", average, prefix) for average in AVERAGES)


def find_matches(layout: Format, contents: dict) -> Iterator[Match]:
    """A :class:`Match` for each place of ``layout`` where the file has names."""
    for branch, container, prefix in places(layout):
        for key, state in _state_dicts(contents, container):
            if any(name.startswith(prefix) for name in state) and not lacks(layout, state):
                yield Match(layout, branch, key, prefix, *_sort(layout, branch, prefix, state))


def lacks(layout: Format, names: Collection[str]) -> bool:
    """Whether a state dict with these names lacks one that the row must have."""
    return not all(
        any(name.startswith(tuple(starts.split("|"))) for name in names) for starts in layout.must.split()
    )


def _sort(layout, branch, prefix, state):
    """The names of a state dict -> (``found``, ``left_over``) of a :class:`Match`."""
    # Beginning of a name: whether it is the backbone's. The other places of the same branch are not
    # accounted for: a file that had both would be ambiguous.
    taken = {
        **dict.fromkeys(layout.drops.split(), False),
        **{other: False for kind, _, other in places(layout) if kind != branch},
        prefix: True,
    }
    found, left_over = {}, []
    for name, value in state.items():
        longest = max((start for start in taken if name.startswith(start)), key=len, default=None)
        short = rename(name.removeprefix(prefix), layout.rename)
        if longest is None or taken[longest] and short in found:
            left_over.append(name)
        elif taken[longest] and not short.endswith("num_batches_tracked"):
            found[short] = value
    return found, left_over


def rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """The name of a tensor after all ``pairs`` of :attr:`Format.rename`."""
    for pattern, replacement in pairs:
        name = re.sub(pattern, replacement, name, count=1)
    return name


def _state_dicts(contents, container):
    """(key, {name: value} without wrappers) below "a/b"; for None, below each of :data:`CONTAINERS`."""
    if container is None:
        held = [key for key in CONTAINERS if key and type(contents.get(key)) is dict]
        for key in held or [""]:
            yield key, state_dict(contents, key)
    elif state := state_dict(contents, container):
        yield container, state


def state_dict(contents: dict, container: str) -> dict[str, Any]:
    """{name: value} below the keys "a/b" of a file, without wrappers.

    Raises ValueError where two names become one.
    """
    for key in filter(None, container.split("/")):
        contents = contents.get(key) if type(contents) is dict else None
    contents = contents if type(contents) is dict else {}
    state = {str(name): value for name, value in contents.items() if name not in IGNORED}
    while wrapper := next((w for w in WRAPPERS if state and all(name.startswith(w) for name in state)), None):
        state = {name.removeprefix(wrapper): value for name, value in state.items()}
    inner = re.compile(rf"(?<=\.)({'|'.join(map(re.escape, INNER_WRAPPERS))})")
    plain = {inner.sub("", name): value for name, value in state.items()}
    if len(plain) < len(state):
        raise ValueError("two of its names are the same without their wrappers")
    return plain
