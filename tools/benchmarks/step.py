"""Milliseconds of one optimizer step, by its parts, for each method."""

import argparse
import statistics

import torch

from rsa_detectron2.common.distributed import device
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.tables import to_markdown
from rsa_detectron2.pretrain.data.datasets import open_images
from rsa_detectron2.pretrain.data.loader import MultiStageViews, StepBatches, build_loader, resolve_workers
from rsa_detectron2.pretrain.engine.step import prefetch
from rsa_detectron2.pretrain.method.objectives import METHODS
from rsa_detectron2.tools.benchmarks.options import add_recipe, positive
from rsa_detectron2.tools.benchmarks.step_timer import StepTimer, synthetic_batches
from rsa_detectron2.tools.benchmarks.timing import bandwidth


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
    """Time steps on a batch that is on the device already; with --data, then steps with the loader.

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
    print_traffic([timer for timer in timers if not timer.compiled], rows, args)
    first = rows[0]["ms"]
    return [{**row, f"x {rows[0]['method']}": row["ms"] / first} for row in rows]


def print_traffic(timers: list[StepTimer], rows: list[dict], args: argparse.Namespace) -> None:
    """Print what the operators of each part move, beside the time of the part on synthetic batches."""
    on_gpu = device().type == "cuda"
    rate = bandwidth() if on_gpu else None
    cells = [["method", "part", "ms", *(["floor ms"] if on_gpu else []), "GB", "operators"]]
    batches = synthetic_batches(args.cfg)
    for timer in timers:
        row = next(row for row in rows if row["method"] == timer.label)
        for part, traffic in timer.count_traffic(batches).items():
            floor = [f"{1000 * traffic.bytes / rate:.2f}"] if on_gpu else []
            moved = f"{traffic.bytes / 1e9:.3f}", str(traffic.operators)
            cells.append([timer.label, part, f"{row[part]:.2f}", *floor, *moved])
        if on_gpu:
            print(f"{timer.label}: {timer.count_synchronizations(batches)} synchronizations in a step")
    print(f"\n{to_markdown(cells)}")
    if on_gpu:
        print(f"floor: the bytes at {rate / 1e9:.0f} GB/s, as fast as a copy; operators: about a kernel each")
    else:
        print("no GPU: synchronizations, and the floor by the bytes, are left out")
    if args.compile:
        print("compiled: kernels of torch.compile are not counted")


def on_synthetic(timers: list[StepTimer], args: argparse.Namespace) -> dict[StepTimer, list[dict]]:
    """The turns of each timer, on a batch that is on the device already."""
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

    Each turn starts its own loader: one that waited for its turn would fill its queue, and slow the others.
    """
    source, batch_size = open_images(args.data), args.cfg.SOLVER.BATCH_SIZE
    views = MultiStageViews(source, args.cfg.DATA.IMAGE_SIZE, seed=0)
    # Use up the batches that are ready when the clock starts: they do not show the workers' speed.
    ready = 2 * workers + 2
    # An index beyond the end starts over, so a folder may hold fewer images than the batches.
    num_images = max(len(source), (ready + args.steps) * batch_size)
    turns = {timer: [] for timer in timers}
    for seed in range(args.repeats):
        for timer in timers:
            order = StepBatches(num_images, batch_size, range(ready + args.steps), seed)
            batches = prefetch(build_loader(views, order, workers), device())
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
        "amp": str(timer.state.amp or "float32").removeprefix("torch."),
        "images/s": speed,
        **epoch,
        "peak MiB": timer.peak,
        **median,
    }
