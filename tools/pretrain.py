#!/usr/bin/env python3
"""Pre-train a ResNet with RSA, or one of its baselines, on a folder of images.

    tools/pretrain.py --epochs 200                        # ImageNet-1K recipe on datasets/imagenet/train
    tools/pretrain.py --data PATH --batch-size 256        # the same on your own images
    tools/pretrain.py --config-file pretrain/cifar10_rsa_R18.yaml --data PATH SOLVER.EPOCHS 20
    tools/pretrain.py --init output/pretrain/model_final.pth --data PATH --output-dir output/second

The same command, run again, goes on from the last checkpoint. KEY VALUE pairs at the end override the
config (pretrain/config.py).
"""

import argparse
import os
from functools import partial

from fvcore.common.config import CfgNode

from rsa_detectron2.common.cli import run
from rsa_detectron2.common.config import CONFIGS
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.config import METHODS
from rsa_detectron2.tools._recipe import load_recipe


def main() -> None:
    args = parse()
    recipe = args.config_file or imagenet_recipe(args.method or "rsa")
    options = {
        "SOLVER.EPOCHS": args.epochs,
        "SOLVER.BATCH_SIZE": args.batch_size,
        "DATA.PATH": args.data,
        "OUTPUT_DIR": args.output_dir,
        "METHOD": args.method,
        "MODEL.INIT": args.init,
        "SOLVER.AMP": args.amp,
        "SEED": args.seed,
        "DATA.NUM_WORKERS": args.workers,
        "SOLVER.MICRO_BATCH": args.micro_batch,
        "SOLVER.COMPILE": args.compile or None,
    }
    given = [item for key, value in options.items() if value is not None for item in (key, value)]
    cfg, came_from, note = load_recipe(recipe, given + args.overrides)
    # Only now that the options are known to be right, because torch is slow to import.
    from rsa_detectron2.common import distributed, launch
    from rsa_detectron2.pretrain.engine import trainer as train_loop
    from rsa_detectron2.pretrain.method import networks
    from rsa_detectron2.tools._weights import read_initial

    networks.check_backbone(cfg.MODEL.BACKBONE, cfg.MODEL.SMALL_STEM)  # before the images are listed
    launch.adopt_slurm(os.environ)
    if distributed.is_first_process():
        if note:
            print(note)
        print(
            f"recipe {recipe}: base lr {cfg.SOLVER.BASE_LR:g}, batch {cfg.SOLVER.BATCH_SIZE}, "
            f"{cfg.SOLVER.EPOCHS} epochs, {cfg.SOLVER.OPTIMIZER}, {cfg.METHOD}; output in {cfg.OUTPUT_DIR}",
            flush=True,
        )
    train = partial(train_loop.train, origin=came_from, reader=read_initial)
    final = launch.launch(train, cfg, launch.Processes(launch.num_processes(args.num_processes)))
    if distributed.is_first_process():
        print(f"done: {final}; next: {next_tool(cfg.MODEL)} {final}")


def next_tool(model: CfgNode) -> str:
    """The next command for a trained backbone (``cfg.MODEL``): convert it, if other libraries have it too."""
    from rsa_detectron2.transfer.convert.architectures import ARCHITECTURES

    convertible = model.BACKBONE in ARCHITECTURES and not model.SMALL_STEM
    return "tools/convert_to_d2.py" if convertible else "tools/evaluate.py knn"


def imagenet_recipe(method: str) -> str:
    """The method's ImageNet-1K recipe. Raises InputError for a method that the paper did not train there."""
    recipe = f"pretrain/imagenet_{method}_R50.yaml"
    if not (CONFIGS / recipe).is_file():
        raise InputError(
            f"--method {method} has no ImageNet-1K recipe: give --config-file, one of configs/pretrain"
        )
    return recipe


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        help="recipe, looked up here and under configs/ (default: the ImageNet-1K recipe of --method "
        "for --epochs)",
    )
    parser.add_argument("--epochs", type=int, help="default: the recipe's, as of all options without another")
    parser.add_argument("--batch-size", type=int, help="global batch, over all GPUs")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="folder of images, CIFAR, STL-10, Tiny ImageNet, or a Hugging Face data set",
    )
    parser.add_argument("--output-dir", metavar="DIR")
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument(
        "--init",
        metavar="FILE",
        help="start from the backbone of this checkpoint: of another run, or any that "
        "tools/convert_to_d2.py reads (default: random weights)",
    )
    parser.add_argument(
        "--micro-batch",
        type=int,
        metavar="N",
        help="images that a process handles at once, accumulating gradients (default: by free memory)",
    )
    parser.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="training processes (default: one per GPU of this machine; without a GPU, one on the CPU)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that load images, per training process (default: by the number of cores)",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the backbones")
    parser.add_argument("--amp", choices=("fp16", "bf16", "off"))
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY VALUE", help="config keys, e.g. SOLVER.BASE_LR 0.3"
    )
    return parser.parse_intermixed_args()  # KEY VALUE pairs may stand between options


if __name__ == "__main__":
    run(main)
