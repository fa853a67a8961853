"""What the server of conftest.py imports once, for the processes of all tests."""

import fvcore.common.config  # noqa: F401
import timm  # noqa: F401
import torch  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import torchvision  # noqa: F401
