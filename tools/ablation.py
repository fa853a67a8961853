#!/usr/bin/env python3
"""The former place of the controlled test, which is now in tools/reproduce.py."""

from rsa_detectron2.common.cli import run
from rsa_detectron2.common.errors import InputError


def main() -> None:
    raise InputError("tools/ablation.py is now tools/reproduce.py controlled")


if __name__ == "__main__":
    run(main)
