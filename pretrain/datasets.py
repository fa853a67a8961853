"""Where images come from: a folder, or a data set in its own format, read one image at a time as uint8 RGB."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import ImageReadMode, decode_image, read_file

from pretrain.config import InputError


class ImageFolder:
    """All images below ``root``, in the order of their paths.

    ``labels`` int64 [N]: the index in ``classes`` of the first-level folder that holds the image, -1 for an image
    that lies in ``root`` itself. Paths are kept as one array of bytes: a list of a million strings would be copied
    into every worker as soon as their reference counts are touched.
    """

    def __init__(self, root):
        self.root = Path(root)
        if not self.root.is_dir():
            raise InputError(f"no image folder {root}: give one with --data PATH, or try tools/quickstart.py, "
                             "which makes its own images")
        names = sorted(os.path.relpath(os.path.join(folder, name), root)
                       for folder, _, files in os.walk(root, followlinks=True) for name in files
                       if name.lower().endswith(IMG_EXTENSIONS))
        if not names:
            raise InputError(f"no images below {root} ({', '.join(IMG_EXTENSIONS)})")
        folders = [name.split(os.sep)[0] if os.sep in name else None for name in names]
        self.classes = sorted({folder for folder in folders if folder})
        index = {folder: i for i, folder in enumerate(self.classes)}
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = np.array([index.get(folder, -1) for folder in folders])

    def __len__(self):
        return len(self.names)

    def read(self, index):
        """Image ``index`` as uint8 RGB [3, H, W]."""
        return read_image(self.root / os.fsdecode(self.names[index]))


def read_image(path):
    """Any image file -> uint8 RGB [3, H, W]; raises InputError naming the file when it cannot be decoded."""
    try:
        image = decode_image(read_file(str(path)), ImageReadMode.RGB)
        return image if image.dtype == torch.uint8 else (image.int() // 257).byte()  # a PNG of 16 bits
    except RuntimeError:
        pass  # a format that torchvision does not decode; PIL knows more of them, slower
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} cannot be decoded as an image ({error}): remove or replace it") from None
