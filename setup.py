"""Package metadata. Detectron2 is not on PyPI, so it is installed by hand (README, "Requirements")."""

from setuptools import setup

setup(
    name="rsa-detectron2",
    version="0.1.0",
    description="RSA self-supervised pre-training, and transfer of its ResNet-50 to Detectron2",
    license="Apache-2.0",
    packages=["common", "pretrain", "transfer"],
    python_requires=">=3.10",
    # Tried: the first and the last of these torch and torchvision, and constraints.txt between them.
    install_requires=[
        "torch>=2.6,<2.15",
        "torchvision>=0.21,<0.30",
        "timm>=1.0.20,<1.1",
        "fvcore>=0.1.5.post20221221",
        "pycocotools>=2.0.8,!=2.0.9,!=2.0.10,<2.1",  # those two fail on files without "info", after training
        "safetensors",
        "numpy",
        "pillow",
        "matplotlib",
        "tensorboard",
        "tqdm",
    ],
    extras_require={"torchcodec": ["torchcodec>=0.16,<0.18"],  # for torch 2.11 or later
                    "hf": ["datasets"], "dev": ["pytest", "pytest-xdist", "scikit-learn", "datasets"]},
)
