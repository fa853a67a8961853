#!/usr/bin/env python3
"""Convert a pre-training checkpoint to ResNet weights for Detectron2, torchvision or timm.

tools/convert_to_d2.py                           # output/pretrain/model_final.pth -> output/weights/
tools/convert_to_d2.py checkpoint.pth weights.pkl --branch target
tools/convert_to_d2.py --inspect checkpoint.pth  # what is in it; writes nothing
"""

import argparse

from rsa_detectron2.common.cli import run
from rsa_detectron2.transfer.convert.architectures import ARCHITECTURES, tensor_shapes
from rsa_detectron2.transfer.convert.inspect import inspect
from rsa_detectron2.transfer.convert.metadata import parse_pixels
from rsa_detectron2.transfer.convert.provenance import BRANCHES, method_of, remarks
from rsa_detectron2.transfer.convert.writers import DEFAULT_INPUT, SUFFIXES, ReadOptions, convert


def main() -> None:
    args = parse()
    pixels = parse_pixels(args.pixels) if args.pixels else None
    if args.inspect:
        print("\n".join(inspect(args.input, args.branch, pixels)))
        return
    options = ReadOptions(args.branch, pixels, args.method)
    output, provenance = convert(args.input, args.output, args.to, options, args.overwrite)
    network = provenance["architecture"]
    step = f" at step {provenance['step']}" if provenance["step"] >= 0 else ""
    print(
        f"{output}: {len(tensor_shapes(network))} tensors of a {ARCHITECTURES[network].label} for {args.to}, "
        f"{provenance['branch']} branch of {method_of(provenance)}{step}, from {args.input} "
        f"(sha256 {provenance['sha256'][:12]})"
    )
    for remark in remarks(provenance):
        print(remark)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "input", nargs="?", default=DEFAULT_INPUT, help=f"checkpoint (default {DEFAULT_INPUT})"
    )
    parser.add_argument(
        "output",
        nargs="?",
        help="file to write (default output/weights/METHOD_r50.pkl, with r18, r101, … for other networks). "
        "If INPUT does not state its method, INPUT's name replaces METHOD.",
    )
    parser.add_argument("--to", choices=SUFFIXES, default="detectron2", help="library to write for")
    parser.add_argument(
        "--branch",
        choices=BRANCHES,
        help="network whose backbone to convert (default: online, or the one that a converted file holds)",
    )
    parser.add_argument(
        "--pixels",
        metavar="imagenet|unscaled|R,G,B/R,G,B",
        help="mean and std that the network was trained with, in [0, 1] or 0-255, if INPUT states none",
    )
    parser.add_argument(
        "--method",
        metavar="NAME",
        help="method that trained the network, such as InfoMin, if INPUT does not state it; "
        "reports show this name",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an output file that came from another source"
    )
    parser.add_argument("--inspect", action="store_true", help="say what INPUT holds, and write nothing")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
