"""Timing variants of the same work fairly, in one process."""

import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from rsa_detectron2.common.distributed import device


def take_turns(
    variants: dict[str, Callable], parts: Sequence, repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Seconds that each variant takes for all ``parts``, each part the median over ``repeats``.

    variants: name -> function of a part.

    The variants take turns part by part, in random order, so that other jobs on the machine slow
    all of them alike. A stall spoils the time of one part, which the median ignores. An untimed
    call comes before each timed one: in a long run, the caches hold what this variant left there.
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


def device_clock() -> float:
    """Wall clock in seconds, read once the device has finished its work."""
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bandwidth() -> float:
    """Bytes per second that a copy reads and writes in the GPU's memory: the best of several."""
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target, times = torch.empty_like(source), []
    for _ in range(10):
        before = device_clock()
        target.copy_(source)
        times.append(device_clock() - before)
    return 2 * source.nbytes / min(times)
