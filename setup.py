"""Package metadata. Detectron2 is not on PyPI, so it is installed by hand (README, "Requirements")."""

from setuptools import setup

setup(
    name="rsa-detectron2",
    version="0.1.0",
    description="RSA self-supervised pre-training, and transfer of its ResNet-50 to Detectron2",
    license="Apache-2.0",
    packages=["common", "pretrain", "transfer"],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "timm>=1.0.20",
        "fvcore>=0.1.5.post20221221",
        "pycocotools>=2.0.7",
        "safetensors",
        "numpy",
        "pillow",
        "matplotlib",
        "tensorboard",
        "tqdm",
    ],
    extras_require={"hf": ["datasets"], "dev": ["pytest", "pytest-xdist", "scikit-learn", "datasets"]},
)
