"""RSA self-supervised pre-training, and transfer of its backbone to Detectron2."""

__version__ = "0.2.0"
