"""``rsa-d2 COMMAND ...`` is the same as ``tools/COMMAND.py ...``."""

import importlib
import sys

from rsa_detectron2 import __version__
from rsa_detectron2.common.cli import run

COMMANDS = {
    "pretrain": "pre-train a ResNet on unlabeled images",
    "convert_to_d2": "write a checkpoint's backbone for Detectron2, torchvision or timm",
    "train_net": "fine-tune a detector from converted weights, and evaluate it",
    "predict": "detections of a fine-tuned model in images, drawn and as COCO JSON",
    "export_onnx": "write a detector of the embedded engine as ONNX",
    "evaluate": "kNN top-1, linear evaluation, and health without labels, of a backbone",
    "embed": "write the features of images as Parquet or NumPy",
    "report": "tables, curves and pictures of fine-tuning or pre-training runs",
    "report_top1": "tables of top-1 beside the paper's",
    "reproduce": "the tables and figures of the paper, and two tests of its claim",
    "label_fractions": "AP by the number of labeled images: is pre-training worth it on my data?",
    "show_views": "aggressive views, and the pairs that drifted most",
    "show_features": "nearest neighbors before and after pre-training, and a map of features",
    "check_device": "does this machine train correctly, and how fast?",
    "prepare_data": "copy a folder of images at a smaller size, for a faster loader",
    "benchmark": "speed of the parts, beside what they replace",
    "quickstart": "the whole chain at a small size, in minutes on a CPU",
}
MOVED = {"ablation": "reproduce controlled"}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: rsa-d2 COMMAND ...   (rsa-d2 COMMAND --help explains one)", "", *lines])


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(usage())
    elif command == "--version":
        print(f"rsa-d2 {__version__}")
    elif command in MOVED:
        print(f"error: rsa-d2 {command} is now rsa-d2 {MOVED[command]}", file=sys.stderr)
        sys.exit(2)
    elif command not in COMMANDS:
        print(f"error: no command {command}: choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv = [f"rsa-d2 {command}", *sys.argv[2:]]
        run(importlib.import_module(f"rsa_detectron2.tools.{command}").main)
