"""Package metadata. Detectron2 is not on PyPI, so it is installed by hand (README, "Requirements")."""

import re
from pathlib import Path

from setuptools import setup

PACKAGE = "rsa_detectron2"
ROOT = Path(__file__).parent
# Folders of the repository that become packages below the one import name.
ROOMS = ("common", "pretrain", "transfer", "tools")
PACKAGES = {PACKAGE: PACKAGE, f"{PACKAGE}.configs": "configs"}
for init in sorted(init for room in ROOMS for init in (ROOT / room).rglob("__init__.py")):
    folder = init.parent.relative_to(ROOT).as_posix()
    PACKAGES[f"{PACKAGE}.{folder.replace('/', '.')}"] = folder

setup(
    name="rsa-detectron2",
    version=re.search(r'__version__ = "(.+)"', (ROOT / PACKAGE / "__init__.py").read_text())[1],
    description="RSA self-supervised pre-training, and transfer of its ResNet-50 to Detectron2",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={f"{PACKAGE}.configs": ["*.yaml", "*/*.yaml", "*/*.txt"], f"{PACKAGE}.tools": ["*.sbatch"]},
    entry_points={"console_scripts": [f"rsa-d2={PACKAGE}.cli:main"]},
    python_requires=">=3.10",
    # Tried: the first and the last of these torch and torchvision, and constraints.txt between them.
    install_requires=[
        "torch>=2.6,<2.15",
        "torchvision>=0.21,<0.30",
        "timm>=1.0.31,<1.1",  # the first whose Lars takes all tensors at once
        "fvcore>=0.1.5.post20221221",
        "pycocotools>=2.0.8,!=2.0.9,!=2.0.10,<2.1",  # those two fail on files without "info", after training
        "safetensors",
        "numpy",
        "pillow",
        "matplotlib",
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "torchcodec": ["torchcodec>=0.16,<0.18"],  # for torch 2.11 or later
        "hf": ["datasets"],
        "onnx": ["onnx", "onnxruntime"],
        "wandb": ["wandb>=0.31"],
        "dev": [
            "setuptools>=70.1",
            "pytest",
            "pytest-xdist",
            "ruff",
            "scikit-learn",
            "datasets",
            "onnx",
            "onnxruntime",
        ],
    },
)
