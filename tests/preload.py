"""Imported once by the server of conftest.py, for the processes of all tests.

What is not installed, or does not load, is left to the test that needs it.
"""

import contextlib
import importlib

for name in (
    "matplotlib.figure",
    "pycocotools.mask",
    "torch.utils.tensorboard",
    "rsa_detectron2.common.launch",
    "rsa_detectron2.pretrain.engine.trainer",  # with timm
    "rsa_detectron2.transfer.tv.engine",
    "rsa_detectron2.transfer.d2.engine",
):
    with contextlib.suppress(Exception):
        importlib.import_module(name)
