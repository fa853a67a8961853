"""What becomes of images that cannot be decoded."""

import os
from pathlib import Path

from pretrain.config import InputError
from pretrain.images import UnreadableImage

TRIES = 100  # images in a row that may be unreadable ...
MAX_BAD = 0.001  # ... and share of all


def read_or_next(images, index):
    """(image, skipped): image ``index``, or the first after it that can be decoded (round the end), and how many could
    not be. Raises InputError after 100."""
    for skipped in range(min(TRIES, len(images))):
        try:
            return images.read((index + skipped) % len(images)), skipped
        except UnreadableImage as error:
            last = error
    raise InputError(f"{skipped + 1} images in a row cannot be decoded, the last: {last}")


class BadImages:
    """``path``, a list of the images of a source that could not be decoded, one name a line; any process may add."""

    def __init__(self, path, images):
        self.path, self.images = Path(path), images

    def __len__(self):
        return len(self.listed())

    def listed(self):
        return set(os.fsdecode(self.path.read_bytes()).splitlines()) if self.path.is_file() else set()

    def add(self, indices):
        """List those that are not yet. Raises InputError when too large a share of the data set is listed."""
        listed = self.listed()
        new = sorted({self.images.name(index) for index in indices} - listed)
        if not new:
            return
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.write(file, os.fsencode("".join(f"{name}\n" for name in new)))
        os.close(file)
        count = len(listed) + len(new)
        if count > MAX_BAD * len(self.images):
            first = os.fsdecode(self.path.read_bytes()).splitlines()[0]
            raise InputError(f"{self.path} lists {count} of {len(self.images)} images as unreadable, over "
                             f"{MAX_BAD:.1%}, {first} first: replace them, delete the list, and start again")
