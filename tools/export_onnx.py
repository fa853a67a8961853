#!/usr/bin/env python3
"""Export a detector of the embedded engine as ONNX, which runs without this package.

    tools/export_onnx.py output/mask_rcnn_R50_FPN_1x detector.onnx

docs/commands.md says what the file takes and gives, and has an example. Detectron2 exports its own models
with tools/deploy/export_model.py.
"""

import argparse
from pathlib import Path

from rsa_detectron2.common.cli import run
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.config import torchvision_defaults
from rsa_detectron2.transfer.report.trained import find_trained


def main() -> None:
    args = parse()
    output = Path(args.output)
    if output.exists() and not args.overwrite:
        raise InputError(f"{output} is there already: give another FILE, or --overwrite")
    trained = find_trained(args.model)
    if trained.engine != "torchvision":
        raise InputError(
            f"{trained.path} is a model of Detectron2, which is exported by Detectron2's "
            "tools/deploy/export_model.py; this tool takes models of --engine torchvision"
        )
    from rsa_detectron2.transfer.tv.export import export_onnx  # slow to import

    cfg = trained.merge_into(torchvision_defaults())
    names = [category["name"] for category in trained.categories(cfg)]
    export_onnx(cfg, trained.path, names, output)
    print(f"{output}: {output.stat().st_size / 1e6:.0f} MB, {len(names)} classes, from {trained.path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="OUTPUT_DIR of a fine-tuning, or a model in it")
    parser.add_argument("output", metavar="FILE.onnx", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE.onnx")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
