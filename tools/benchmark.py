#!/usr/bin/env python3
"""How fast this machine runs what pre-training is made of. Prints a table, then the same as JSON, one line a row.

    tools/benchmark.py data --data PATH    # images/s of a loader's worker: this project, PIL pipelines, decoding alone
    tools/benchmark.py augment             # the aggressive stage: this project, torchvision, kornia
    tools/benchmark.py step                # one optimizer step, by its parts: RSA, BYOL, SimSiam
    tools/benchmark.py step --config-file pretrain/cifar10_rsa_R18.yaml --epoch-images 50000
    tools/benchmark.py optim               # LARS and the EMA, over all tensors at once and one by one

What is compared takes turns within one run; every figure is the median over --repeats. Without a GPU the defaults of
augment, step and optim are smaller, and the first lines say so. docs/benchmarks.md has figures.
"""

import argparse
import itertools
import json
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, ImageFilter
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.transforms.v2 import functional as TF

from rsa_detectron2.common.cli import run
from rsa_detectron2.common.config import find_config, merge_config
from rsa_detectron2.common.distributed import amp_dtype, device
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.config import IMAGENET_MEAN, IMAGENET_STD, check, get_cfg
from rsa_detectron2.pretrain.data.datasets import ImageFolder, open_images
from rsa_detectron2.pretrain.data.images import native_name
from rsa_detectron2.pretrain.data.loader import MultiStageViews, StepBatches, build_loader, resolve_workers
from rsa_detectron2.pretrain.engine import trainer as train_loop
from rsa_detectron2.pretrain.method.augment import (
    BLUR_RADIUS,
    FACTORS,
    GRAY,
    MAX_SIGMA,
    ORDER,
    SIGMA,
    aggressive,
    draw_params,
    to_float,
)
from rsa_detectron2.pretrain.method.networks import build_networks
from rsa_detectron2.pretrain.method.objectives import METHODS
from rsa_detectron2.pretrain.method.optim import build_optimizer, set_lr
from rsa_detectron2.transfer.data import shapes

FOLDERS = ("datasets/imagenet/train", "output/quickstart/images/train")  # where ``data`` looks for images
GPU = {"backbone": "resnet50", "size": 224, "batch_size": 256, "amp": "fp16", "steps": 20}
CPU = {"backbone": "resnet18", "size": 64, "batch_size": 32, "amp": "off", "steps": 1}
PARTS = ("data wait", "aggressive stage", "forward target", "forward online", "backward", "optimizer", "EMA")


def main():
    args = parse()
    on_gpu = device().type == "cuda"
    defaults = (GPU if on_gpu else CPU) | (of_recipe(args.cfg) if args.config_file else {})
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, 224 if (args.what, name) == ("data", "size") else value)
    machine = {
        "machine": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "decoder": native_name,
    }
    print(
        ", ".join(value if name == "machine" else f"{name} {value}" for name, value in machine.items()),
        flush=True,
    )
    if not on_gpu and args.what != "data" and not args.config_file:
        print("no GPU: small defaults; --backbone, --size, --batch-size and --steps set others")
    rows = {"data": data, "augment": augment, "step": step, "optim": optim}[args.what](args)
    print_table(rows)
    lines = "".join(json.dumps({"benchmark": args.what, **machine, **row}) + "\n" for row in rows)
    print(lines, end="")
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(lines)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("data", "augment", "step", "optim"))
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="images: of data, instead of those that it finds or draws; of "
        "step, to measure with the loader besides",
    )
    parser.add_argument(
        "--config-file",
        help="of step: take the networks, size, batch and AMP of a recipe of "
        "configs/pretrain; the options below come before it",
    )
    parser.add_argument(
        "--epoch-images", type=positive, metavar="N", help="of step: seconds per epoch of N images"
    )
    parser.add_argument("--output", metavar="FILE", help="write the JSON lines to a file too")
    parser.add_argument(
        "--images", type=positive, default=64, help="of data: how many, evenly spaced (default 64)"
    )
    parser.add_argument(
        "--prepared", metavar="PATH", help="of data: what tools/prepare_data.py has made of the images"
    )
    parser.add_argument("--size", type=positive, help="of a view, in pixels")
    parser.add_argument("--batch-size", type=positive)
    parser.add_argument("--backbone")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["byol", "rsa", "simsiam"], help="of step"
    )
    parser.add_argument(
        "--compile", action="store_true", help="of step: each method once more, with torch.compile"
    )
    parser.add_argument("--amp", choices=("fp16", "bf16", "off"))
    parser.add_argument("--steps", type=positive, help="of step: in a turn")
    parser.add_argument(
        "--workers", type=int, default=-1, help="of step with --data (default: from the cores)"
    )
    parser.add_argument("--repeats", type=positive, default=5, help="turns of each (default 5)")
    args = parser.parse_args()
    path = args.config_file and find_config(args.config_file)
    args.cfg = merge_config(get_cfg(), path, [])
    check(args.cfg)
    return args


def of_recipe(cfg):
    return {
        "backbone": cfg.MODEL.BACKBONE,
        "size": cfg.DATA.IMAGE_SIZE,
        "batch_size": cfg.SOLVER.BATCH_SIZE,
        "amp": cfg.SOLVER.AMP,
    }


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def cpu_name():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def print_table(rows):
    cells = [list(rows[0])] + [
        [
            f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
            for value in row.values()
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print()
    for row in cells:
        print(
            "  ".join(
                text.ljust(width) if i == 0 else text.rjust(width)
                for i, (text, width) in enumerate(zip(row, widths))
            )
        )
    print()


def take_turns(variants, parts, repeats, clock):
    """{name: function of a part} -> {name: seconds for all parts, each the median over ``repeats``}.

    The variants take turns part by part in random order, so that what else the machine does meets them all alike; a
    stall spoils one of a part's times, which the median leaves out. A call that is not timed goes before each: in a
    long run the caches hold what the work itself left there.
    """
    seconds = {name: [[] for _ in parts] for name in variants}
    order = random.Random(0)
    for _ in range(repeats):
        for i, part in enumerate(parts):
            for name in order.sample(list(variants), len(variants)):
                variants[name](part)
                before = clock()
                variants[name](part)
                seconds[name][i].append(clock() - before)
    return {name: sum(map(statistics.median, times)) for name, times in seconds.items()}


def finished():
    """Wall clock, in seconds, when the device has done all it was given."""
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- data ----


def data(args):
    """Images per second of one core's time: process time, so that other jobs on the machine count less."""
    torch.set_num_threads(1)  # as in a loader's worker
    random.seed(0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as drawn:
        images = find_images(args.data, drawn)
        indices = np.unique(np.linspace(0, len(images) - 1, args.images).astype(int)).tolist()

        def this_project(images):
            views, epochs = MultiStageViews(images, args.size, seed=0), itertools.count()

            def of_part(part):
                epoch = next(epochs)
                views.collate([views[epoch, index] for index in part])

            return of_part

        def in_pil(views):
            return lambda part: default_collate([views(images.name(i)) for i in part])

        variants = {
            "RSA in PIL, four float views": in_pil(rsa_in_pil(args.size)),
            "BYOL in PIL, two float views": in_pil(byol_in_pil(args.size)),
            "this project": this_project(images),
            "decoding alone": lambda part: [images.read(i) for i in part],
        }
        if args.prepared:
            prepared = open_images(args.prepared)
            if len(prepared) != len(images):
                raise InputError(
                    f"--prepared {args.prepared} has {len(prepared)} images, not the {len(images)} of "
                    f"{images.root}: write it with tools/prepare_data.py"
                )
            variants["this project, prepared images"] = this_project(prepared)
        parts = [indices[i : i + 4] for i in range(0, len(indices), 4)]
        seconds = take_turns(variants, parts, args.repeats, time.process_time)
    rates = {name: len(indices) / value for name, value in seconds.items()}
    first, last = list(rates.values())[0], rates["decoding alone"]
    return [
        {"variant": name, "images/s per core": rate, "x RSA in PIL": rate / first, "x decoding": rate / last}
        for name, rate in rates.items()
    ]


def find_images(path, drawn):
    """The ImageFolder at ``path``, or else at one of FOLDERS, or else of images drawn into the folder ``drawn``."""
    path = path or next((folder for folder in FOLDERS if Path(folder).is_dir()), None)
    if path is None:
        print(
            "no images found: drawn ones of 400 px stand in; photographs (--data PATH) take longer to decode"
        )
        path = shapes.write_image_folder(drawn, 8, 400, 0)
    images = open_images(path)
    if not isinstance(images, ImageFolder):
        raise InputError(
            f"--data {path} is not a folder of image files, which the PIL pipelines need: give one"
        )
    print(f"{len(images)} images of {images.root}")
    return images


def rsa_in_pil(size):
    """File name -> four normalised float views, as the authors' public code makes them, in PIL: two weak views, and an
    aggressive one of each."""
    weak = transforms.Compose(
        [transforms.RandomResizedCrop(size, scale=(0.2, 1.0)), transforms.RandomHorizontalFlip()]
    )
    strong, finish = aggressive_in_pil(), to_normalised()

    def views(name):
        image = open_in_pil(name)
        pair = [weak(image) for _ in range(2)]
        return [finish(view) for view in pair + [strong(view) for view in pair]]

    return views


def byol_in_pil(size):
    """File name -> two normalised float aggressive views."""
    view = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            aggressive_in_pil(),
            to_normalised(),
        ]
    )

    def views(name):
        image = open_in_pil(name)
        return [view(image) for _ in range(2)]

    return views


def open_in_pil(name):
    with Image.open(name) as image:
        return image.convert("RGB")


def aggressive_in_pil():
    def blur(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, MAX_SIGMA)))

    return transforms.Compose(
        [
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=0.5),
        ]
    )


def to_normalised():
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


# ---- augment ----


def augment(args):
    """Milliseconds per view of the aggressive stage: uint8 views on the device to float views."""
    views, params = synthetic(args.batch_size, args.size)
    views = views.to(device())
    variants = {
        "this project": lambda _: aggressive(views, params),
        "torchvision, one by one": lambda _: one_by_one(views, params),
    }
    try:
        variants["kornia"] = in_kornia(views)
    except ImportError:
        print("kornia is not installed: skipped (pip install kornia)")
    with torch.no_grad():
        seconds = take_turns(variants, [None], args.repeats, finished)
    count = 2 * args.batch_size
    return [
        {
            "variant": name,
            "size": args.size,
            "views": count,
            "ms per view": 1000 * value / count,
            "ms": 1000 * value,
            "x this project": value / seconds["this project"],
        }
        for name, value in seconds.items()
    ]


def synthetic(batch_size, size):
    """Views uint8 [B, 2, 3, S, S] of noise, and params [B, 2, P] as the loader draws them."""
    rng = np.random.default_rng(0)
    params = torch.stack([draw_params(rng) for _ in range(2 * batch_size)]).view(batch_size, 2, -1)
    return torch.from_numpy(rng.integers(0, 256, (batch_size, 2, 3, size, size), dtype=np.uint8)), params


def one_by_one(views, params):
    """The aggressive stage by torchvision's functional, one view after the other."""
    adjust = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    result = []
    for image, row in zip(to_float(views.flatten(0, 1)), params.flatten(0, 1)):
        factors = row[FACTORS].tolist()
        for operation in row[ORDER].int().tolist():
            if operation >= 0:
                image = adjust[operation](image, factors[operation])
        if row[GRAY]:
            image = TF.rgb_to_grayscale(image, 3)
        if row[SIGMA]:
            image = TF.gaussian_blur(image, 2 * BLUR_RADIUS + 1, row[SIGMA].item())
        result.append(image)
    return torch.stack(result).view(views.shape)


def in_kornia(views):
    """kornia's operations with the same probabilities and ranges; it draws one order of the jitter for a batch."""
    from kornia import augmentation

    kernel = 2 * BLUR_RADIUS + 1
    stage = torch.nn.Sequential(
        augmentation.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        augmentation.RandomGrayscale(p=0.2),
        augmentation.RandomGaussianBlur((kernel, kernel), (0.1, MAX_SIGMA), p=0.5),
    )
    return lambda _: stage(to_float(views.flatten(0, 1)))


# ---- step ----


def step(args):
    """Milliseconds of one optimizer step and of its parts, on a batch that lies on the device: the ceiling; with --data
    once more with the loader."""
    torch.backends.cudnn.benchmark = True
    contenders = {
        (method, compiled): Contender(method, args, compiled)
        for method in args.methods
        for compiled in (False, True)[: 1 + args.compile]
    }
    views, params = synthetic(args.batch_size, args.size)
    batches = itertools.repeat({"views": views.to(device()), "params": params})
    turns = {name: [] for name in contenders}
    for _ in range(args.repeats):
        for name, contender in contenders.items():
            turns[name].append(contender.turn(batches, args.steps))
    rows = [contender.row("synthetic", turns[name], args) for name, contender in contenders.items()]
    if args.data:
        rows += with_loader(contenders, args)
    first = rows[0]["ms"]
    return [{**row, f"x {rows[0]['method']}": row["ms"] / first} for row in rows]


def with_loader(contenders, args):
    """Rows of the same with a loader. Each turn has its own: another's would fill up while it waits, and slow this one."""
    images, workers = open_images(args.data), resolve_workers(args.workers)
    # What the workers have ready when the clock starts does not tell how fast they are: it is used up first.
    ready = 2 * workers + 2
    # A folder smaller than the batches goes round: an index beyond its end starts anew.
    size = max(len(images), (ready + args.steps) * args.batch_size)
    turns = {name: [] for name in contenders}
    for seed in range(args.repeats):
        for name, contender in contenders.items():
            parts = StepBatches(size, args.batch_size, ready + args.steps, seed)
            batches = train_loop.ahead(
                build_loader(MultiStageViews(images, args.size, 0), parts, workers), device()
            )
            contender.turn(batches, ready)
            turns[name].append(contender.turn(batches, args.steps))
    return [contender.row(f"{workers} workers", turns[name], args) for name, contender in contenders.items()]


class Contender:
    """A method's networks and optimizer, with hooks that cut :func:`train_loop.train_step` into its parts."""

    def __init__(self, method, args, compiled=False):
        held = memory(torch.cuda.memory_allocated)
        cfg = args.cfg.clone()
        cfg.MODEL.BACKBONE, cfg.METHOD = args.backbone, method
        torch.manual_seed(0)
        self.networks = build_networks(cfg, METHODS[method]).to(device()).train()
        if compiled:
            self.networks.compile_backbones()
        self.optimizer = build_optimizer(self.networks, cfg.SOLVER, METHODS[method].fix_predictor_lr)
        set_lr(self.optimizer, 0.01, 0.01)
        self.amp = amp_dtype(args.amp)
        self.mean, self.std = (
            torch.tensor(values, device=device()) for values in (cfg.DATA.MEAN, cfg.DATA.STD)
        )
        self.scaler = torch.amp.GradScaler(
            device().type,
            init_scale=1024.0,  # so low that no step is skipped
            enabled=self.amp == torch.float16,
        )
        self.method, self.points = method + ", compiled" * compiled, []
        if self.networks.target is not None:
            self.networks.target.register_forward_pre_hook(lambda *_: self.mark("forward online"))
            self.networks.target.register_forward_hook(lambda *_: self.mark("forward target"))
        self.networks.register_forward_hook(lambda *_: self.mark("forward online"))
        self.optimizer.register_step_pre_hook(lambda *_: self.mark("backward"))
        self.optimizer.register_step_post_hook(lambda *_: self.mark("optimizer"))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        views, params = synthetic(args.batch_size, args.size)
        # cuDNN chooses its algorithms, torch.compile compiles.
        self.turn(itertools.repeat({"views": views.to(device()), "params": params}), 3)
        self.peak = memory(torch.cuda.max_memory_allocated, held)

    def mark(self, part):
        """What ran since the mark before was ``part``."""
        if device().type == "cuda":
            point = torch.cuda.Event(enable_timing=True)
            point.record()
        else:
            point = time.perf_counter()
        self.points.append((part, point))

    def turn(self, batches, steps):
        """Milliseconds per step of ``steps`` steps, {part: ms} with their sum as "ms"."""
        self.points = []
        self.mark(None)
        for _ in range(steps):
            train_loop.train_step(
                self.networks,
                self.optimizer,
                self.scaler,
                self.amp,
                self.micro_batches(batches),
                1,
                beta=0.2,
                tau=0.99,
            )
            self.mark("EMA")
        finished()
        parts = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, after) in zip(self.points, self.points[1:]):
            parts[part] += (
                before.elapsed_time(after) if device().type == "cuda" else 1000 * (after - before)
            ) / steps
        return {"ms": sum(parts.values()), **parts}

    def micro_batches(self, batches):
        self.mark("optimizer")  # which has cleared the gradients
        batch = next(batches)
        self.mark("data wait")
        views = train_loop.normalised_views(batch, self.mean, self.std)
        self.mark("aggressive stage")
        yield views

    def row(self, source, turns, args):
        median = {part: statistics.median(turn[part] for turn in turns) for part in turns[0]}
        speed = 1000 * args.batch_size / median["ms"]
        epoch = {"s per epoch": args.epoch_images / speed} if args.epoch_images else {}
        return {
            "method": self.method,
            "data": source,
            "backbone": args.backbone,
            "size": args.size,
            "batch": args.batch_size,
            "amp": str(self.amp or "float32").removeprefix("torch."),
            "images/s": speed,
            **epoch,
            "peak MiB": self.peak,
            **median,
        }


def memory(read, held=0):
    """MiB of the GPU that ``read`` tells, beyond ``held`` MiB; None without a GPU."""
    return read() / 2**20 - (held or 0) if torch.cuda.is_available() else None


# ---- optim ----


def optim(args):
    """Milliseconds of the optimizer and of the EMA, which do not depend on the images."""
    cfg = args.cfg.clone()
    cfg.MODEL.BACKBONE, cfg.SOLVER.OPTIMIZER = args.backbone, "lars"
    torch.manual_seed(0)
    networks = build_networks(cfg, METHODS["rsa"]).to(device())
    parameters = [p for p in networks.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)

    def lars(foreach):
        optimizer = build_optimizer(networks, cfg.SOLVER)
        for group in optimizer.param_groups:
            group["lr"], group["foreach"] = 1e-6, foreach
        return lambda _: optimizer.step()

    @torch.no_grad()
    def ema_one_by_one(_):
        for slow, fast in zip(networks.target.parameters(), networks.online.parameters()):
            slow.lerp_(fast, 0.01)

    variants = {
        "LARS, all at once": lars(True),
        "LARS, one by one": lars(False),
        "EMA, all at once": lambda _: networks.update_target(0.99),
        "EMA, one by one": ema_one_by_one,
    }
    seconds = take_turns(variants, [None], 5 * args.repeats, finished)
    return [
        {"variant": name, "backbone": args.backbone, "tensors": len(parameters), "ms": 1000 * value}
        for name, value in seconds.items()
    ]


if __name__ == "__main__":
    run(main)
