"""Milliseconds of one optimizer step, by its parts, for each method."""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from fvcore.common.config import CfgNode

from rsa_detectron2.common.distributed import amp_dtype, device
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data.datasets import open_images
from rsa_detectron2.pretrain.data.loader import MultiStageViews, StepBatches, build_loader, resolve_workers
from rsa_detectron2.pretrain.engine import trainer
from rsa_detectron2.pretrain.method.networks import build_networks
from rsa_detectron2.pretrain.method.objectives import METHODS
from rsa_detectron2.pretrain.method.optim import build_optimizer, set_lr
from rsa_detectron2.tools.benchmarks.augment import synthetic_views
from rsa_detectron2.tools.benchmarks.options import add_recipe, positive
from rsa_detectron2.tools.benchmarks.timing import device_clock

PARTS = ("data wait", "aggressive stage", "forward target", "forward online", "backward", "optimizer", "EMA")
WARM_UP = 3  # steps in which cuDNN chooses its algorithms and torch.compile compiles


def add_options(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, "size", "batch_size", "backbone", "amp")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["byol", "rsa", "simsiam"])
    parser.add_argument("--compile", action="store_true", help="each method once more, with torch.compile")
    parser.add_argument("--steps", type=positive, help="in a turn (default 20 on a GPU, else 1)")
    parser.add_argument("--data", metavar="PATH", help="images, to measure with the loader too")
    parser.add_argument("--workers", type=int, help="of the loader (default: from the cores)")
    parser.add_argument(
        "--epoch-images", type=positive, metavar="N", help="adds seconds per epoch of N images"
    )


def measure(args: argparse.Namespace) -> list[dict]:
    """On a batch that lies on the device, which is the ceiling; with --data once more with the loader.

    Raises InputError.
    """
    if args.workers is not None and not args.data:
        raise InputError("--workers sets those of the loader, which is measured with --data PATH only")
    args.steps = args.steps or (20 if device().type == "cuda" else 1)
    torch.backends.cudnn.benchmark = True
    timers = []
    for method in dict.fromkeys(args.methods):
        for compiled in (False, True) if args.compile else (False,):
            timers.append(StepTimer(args.cfg, method, compiled))
            timers[-1].warm_up()
    turns = on_synthetic(timers, args)
    rows = [make_row(timer, "synthetic", turns[timer], args) for timer in timers]
    if args.data:
        workers = resolve_workers(-1 if args.workers is None else args.workers)
        turns = with_loader(timers, workers, args)
        rows += [make_row(timer, f"{workers} workers", turns[timer], args) for timer in timers]
    first = rows[0]["ms"]
    return [{**row, f"x {rows[0]['method']}": row["ms"] / first} for row in rows]


class StepTimer:
    """A method's networks and optimizer, with hooks that time the parts of a training step."""

    def __init__(self, cfg: CfgNode, method: str, compiled: bool = False):
        self.memory_before = gpu_memory(torch.cuda.memory_allocated)
        self.peak = None  # MiB
        self.cfg = cfg.clone()
        self.cfg.METHOD = method
        self.label = f"{method}, compiled" if compiled else method
        self.amp = amp_dtype(cfg.SOLVER.AMP)
        torch.manual_seed(0)
        self.networks = build_networks(self.cfg, METHODS[method]).to(device()).train()
        if compiled:
            self.networks.compile_backbones()
        self.optimizer = build_optimizer(self.networks, cfg.SOLVER, METHODS[method].fix_predictor_lr)
        set_lr(self.optimizer, 0.01, 0.01)
        self.scaler = torch.amp.GradScaler(
            device().type,
            init_scale=1024.0,  # low enough that no step is skipped
            enabled=self.amp == torch.float16,
        )
        self.mean, self.std = (
            torch.tensor(values, device=device()) for values in (cfg.DATA.MEAN, cfg.DATA.STD)
        )
        self.marks = []
        self.add_hooks()

    def add_hooks(self) -> None:
        """Mark where each part ends. Hooks are called with arguments that do not matter here."""
        target = self.networks.target
        if target is not None:
            target.register_forward_pre_hook(lambda *_: self.mark("forward online"))
            target.register_forward_hook(lambda *_: self.mark("forward target"))
        self.networks.register_forward_hook(lambda *_: self.mark("forward online"))
        self.optimizer.register_step_pre_hook(lambda *_: self.mark("backward"))
        self.optimizer.register_step_post_hook(lambda *_: self.mark("optimizer"))

    def mark(self, part: str | None) -> None:
        """``part`` has run since the last mark."""
        if device().type == "cuda":
            point = torch.cuda.Event(enable_timing=True)
            point.record()
        else:
            point = time.perf_counter()
        self.marks.append((part, point))

    def warm_up(self) -> None:
        """Some steps that are not timed; they show the peak of memory."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.run(synthetic_batches(self.cfg), WARM_UP)
        self.peak = gpu_memory(torch.cuda.max_memory_allocated, self.memory_before)

    def run(self, batches: Iterator[dict], steps: int) -> dict[str, float]:
        """Milliseconds per step over ``steps`` steps: {part: ms}, and their sum as "ms"."""
        self.marks = []
        self.mark(None)
        for _ in range(steps):
            self.step(batches)
            self.mark("EMA")
        device_clock()
        parts = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, after) in zip(self.marks, self.marks[1:]):
            parts[part] += milliseconds(before, after) / steps
        return {"ms": sum(parts.values()), **parts}

    def step(self, batches: Iterator[dict]) -> None:
        trainer.train_step(
            self.networks, self.optimizer, self.scaler, self.amp, self.views(batches), 1, beta=0.2, tau=0.99
        )

    def views(self, batches: Iterator[dict]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The one micro-batch of a step: normalized weak and aggressive views."""
        self.mark("optimizer")  # which has cleared the gradients
        batch = next(batches)
        self.mark("data wait")
        views = trainer.normalised_views(batch, self.mean, self.std)
        self.mark("aggressive stage")
        yield views


def milliseconds(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    """Between two marks: events of the GPU, or seconds."""
    if device().type == "cuda":
        return before.elapsed_time(after)
    return 1000 * (after - before)


def gpu_memory(read: Callable[[], int], before: float | None = None) -> float | None:
    """MiB that ``read`` reports beyond ``before``; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return read() / 2**20 - (before or 0)


def synthetic_batches(cfg: CfgNode) -> Iterator[dict]:
    """One batch of noise that lies on the device, again and again."""
    views, params = synthetic_views(cfg.SOLVER.BATCH_SIZE, cfg.DATA.IMAGE_SIZE)
    return itertools.repeat({"views": views.to(device()), "params": params})


def on_synthetic(timers: list[StepTimer], args: argparse.Namespace) -> dict[StepTimer, list[dict]]:
    """The turns of each timer, on a batch that lies on the device."""
    batches = synthetic_batches(args.cfg)
    turns = {timer: [] for timer in timers}
    for _ in range(args.repeats):
        for timer in timers:
            turns[timer].append(timer.run(batches, args.steps))
    return turns


def with_loader(
    timers: list[StepTimer], workers: int, args: argparse.Namespace
) -> dict[StepTimer, list[dict]]:
    """The turns of each timer, with a loader. Raises InputError.

    Each turn starts a loader of its own: another's would fill its queue while it waits, and slow this one.
    """
    source, batch_size = open_images(args.data), args.cfg.SOLVER.BATCH_SIZE
    views = MultiStageViews(source, args.cfg.DATA.IMAGE_SIZE, seed=0)
    # Batches that are ready when the clock starts do not show the workers' speed: use them up first.
    ready = 2 * workers + 2
    # Datasets start again at their end, so a folder may be smaller than the batches.
    num_images = max(len(source), (ready + args.steps) * batch_size)
    turns = {timer: [] for timer in timers}
    for seed in range(args.repeats):
        for timer in timers:
            order = StepBatches(num_images, batch_size, ready + args.steps, seed)
            batches = trainer.ahead(build_loader(views, order, workers), device())
            timer.run(batches, ready)
            turns[timer].append(timer.run(batches, args.steps))
    return turns


def make_row(timer: StepTimer, source: str, turns: list[dict], args: argparse.Namespace) -> dict:
    """The medians of the turns, and what was measured."""
    median = {part: statistics.median(turn[part] for turn in turns) for part in turns[0]}
    cfg = timer.cfg
    speed = 1000 * cfg.SOLVER.BATCH_SIZE / median["ms"]
    epoch = {"s per epoch": args.epoch_images / speed} if args.epoch_images else {}
    return {
        "method": timer.label,
        "data": source,
        "backbone": cfg.MODEL.BACKBONE,
        "size": cfg.DATA.IMAGE_SIZE,
        "batch": cfg.SOLVER.BATCH_SIZE,
        "amp": str(timer.amp or "float32").removeprefix("torch."),
        "images/s": speed,
        **epoch,
        "peak MiB": timer.peak,
        **median,
    }
