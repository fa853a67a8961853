"""What the server of conftest.py imports once, for the processes of all tests."""

import matplotlib.figure  # noqa: F401
import pycocotools.mask  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import torchvision.models.detection  # noqa: F401
