"""Checks of a step: how often it waits for the GPU, the memory that it takes, how fast it is."""

import argparse

import torch

from rsa_detectron2.common.distributed import amp_dtype
from rsa_detectron2.pretrain.engine import memory
from rsa_detectron2.pretrain.method.networks import build_networks
from rsa_detectron2.pretrain.method.objectives import METHODS
from rsa_detectron2.tools.benchmarks import options, step
from rsa_detectron2.tools.benchmarks.step_timer import StepTimer, synthetic_batches
from rsa_detectron2.tools.checks.figure import Figure, worst
from rsa_detectron2.tools.checks.numerics import small_cfg

# How often a step may wait for the GPU: in fp16 the scaler asks whether a gradient has overflowed.
SYNCHRONIZATIONS = {"bf16": 0, "fp16": 1}


def check_synchronizations() -> list[Figure]:
    """How often a step of each method waits for the GPU."""
    return worst(count_synchronizations(method) for method in METHODS)


def count_synchronizations(method: str) -> list[Figure]:
    figures = []
    for amp, limit in SYNCHRONIZATIONS.items():
        timer = StepTimer(small_cfg(amp), method)
        timer.warm_up()
        count = timer.count_synchronizations(synthetic_batches(timer.cfg))
        figures.append(Figure(f"in {amp}", count, limit))
    return figures


def check_memory() -> list[Figure]:
    """The peak of a step against the memory that choosing the micro-batch sets aside for it."""
    cfg = full_size().cfg
    networks, amp = build_networks(cfg, METHODS["rsa"]), amp_dtype(cfg.SOLVER.AMP)
    needed = memory.needed(networks, cfg.DATA.IMAGE_SIZE, amp, cfg.SOLVER.BATCH_SIZE)
    torch.backends.cudnn.benchmark = True  # as in a training
    timer = StepTimer(cfg, "rsa")
    timer.warm_up()
    timer.warm_up()  # without the workspaces of algorithms that cuDNN only tried
    peak = timer.peak * 2**20
    name = f"peak of {cfg.SOLVER.BATCH_SIZE} images, {peak / 2**30:.3g} GiB, over what is set aside:"
    return [Figure(name, peak / needed, 1)]


def check_speed() -> list[Figure]:
    """Milliseconds of a step. Prints those of its parts, with the bytes that they move."""
    (row,) = step.measure(full_size())
    name = f"ms a step of {row['batch']} images of {row['size']} px ({row['backbone']}, {row['amp']}):"
    return [Figure(name, row["ms"])]


def full_size() -> argparse.Namespace:
    """The options of tools/benchmark.py step for RSA, with as many images as fit on the device."""
    parser = argparse.ArgumentParser()
    step.add_options(parser)
    options.add_common(parser)
    args = parser.parse_args(["--methods", "rsa", "--repeats", "3"])
    options.resolve(args)
    solver, size = args.cfg.SOLVER, args.cfg.DATA.IMAGE_SIZE
    networks = build_networks(args.cfg, METHODS["rsa"])
    solver.BATCH_SIZE = memory.resolve(
        0, solver.BATCH_SIZE, lambda: memory.max_batch_size(networks, size, amp_dtype(solver.AMP))
    )
    return args
