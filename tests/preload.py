"""Imported once by the server of conftest.py, for the processes of all tests."""

import importlib

for name in (
    "matplotlib.figure",
    "pycocotools.mask",
    "torch.utils.tensorboard",
    "torchvision.models.detection",
):
    importlib.import_module(name)
