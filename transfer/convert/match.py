"""What a row of formats.py finds in a file."""

from dataclasses import dataclass

from rsa_detectron2.transfer.convert import architectures
from rsa_detectron2.transfer.convert.formats import Format


@dataclass
class Match:
    """What a row finds at one of its places: ``found`` {torchvision name: stored value} of ``branch``, and
    ``left_over``, the names that the row does not account for."""

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
