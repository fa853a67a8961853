#!/usr/bin/env python3
"""Does this machine train correctly, and how fast? Two minutes, no data needed, on a GPU or a CPU.

    tools/check_device.py              # all checks
    tools/check_device.py resume bf16  # some of them

Each check prints one line: ok or FAILED with its figures and their limits, or - with what the machine lacks.
The exit status is 1 if a check failed. docs/commands.md says what a failure means.
"""

import argparse
import contextlib
import gc
import io
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from rsa_detectron2.common.cli import run
from rsa_detectron2.common.distributed import device
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.tools.benchmark import describe_machine
from rsa_detectron2.tools.checks import numerics, runs, speed
from rsa_detectron2.tools.checks.figure import Figure


@dataclass(frozen=True)
class Check:
    measure: Callable[[], list[Figure]]
    what: str  # for --help
    without_gpu: str = ""  # why it is left out on a CPU


CHECKS = {
    "views": Check(numerics.check_views, "aggressive views against torchvision's"),
    "gradients": Check(numerics.check_gradients, "all methods' losses and gradients against a CPU's float64"),
    "fp16": Check(
        partial(numerics.check_steps, "fp16"),
        "a step of each method, and one that overflows",
        "needs a GPU: on a CPU bf16 takes its place",
    ),
    "bf16": Check(partial(numerics.check_steps, "bf16"), "the same in bf16"),
    "float32": Check(partial(numerics.check_steps, "off"), "the same without AMP"),
    "resume": Check(runs.check_resume, "a run that goes on from its middle has the bits of a whole one"),
    "processes": Check(runs.check_processes, "two processes compute the same as one"),
    "waits": Check(
        speed.check_synchronizations, "how often a step waits for the GPU", "needs a GPU: a CPU does not wait"
    ),
    "memory": Check(
        speed.check_memory,
        "the peak of a step against the estimate that chooses the micro-batch",
        "needs a GPU: on a CPU no peak is counted",
    ),
    "speed": Check(speed.check_speed, "ms of a step and of its parts, and the bytes that they move"),
}


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what a check started, like Ctrl-C
    names = parse().checks or CHECKS
    machine, *versions = describe_machine().items()
    print(", ".join([machine[1], *(f"{what} {value}" for what, value in versions)]), flush=True)
    failed = []
    progress = tqdm(names, unit="check", leave=False, disable=None, dynamic_ncols=True)
    for name in progress:
        progress.set_description(name)
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            status, text = carry_out(CHECKS[name])
        if status == "FAILED":
            failed.append(name)
        tqdm.write(f"{status:6}  {name:9}  {text}  [{time.perf_counter() - start:.0f} s]")
        if printed.getvalue():
            tqdm.write(printed.getvalue())
        gc.collect()  # the hooks of a StepTimer hold it in a cycle
        torch.cuda.empty_cache()
    if failed:
        print(f"{len(failed)} of {len(names)} checks FAILED: {', '.join(failed)}")
        return 1
    print("no check failed")
    return 0


def carry_out(check: Check) -> tuple[str, str]:
    """The status of a check and the rest of its line. An error of any kind is a failure."""
    if check.without_gpu and device().type == "cpu":
        return "-", check.without_gpu
    try:
        figures = check.measure()
    except Exception as error:
        # The error of another process is the last line of a traceback.
        return "FAILED", f"{type(error).__name__}: {runs.last_line(str(error))}"
    return "ok" if all(figure.passes for figure in figures) else "FAILED", ", ".join(map(str, figures))


def parse() -> argparse.Namespace:
    """Raises InputError for a check that there is not."""
    listed = "\n".join(f"  {name:9}  {check.what}" for name, check in CHECKS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="default: all")
    args = parser.parse_args()
    if unknown := [name for name in args.checks if name not in CHECKS]:
        raise InputError(f"no check {unknown[0]}: choose among {', '.join(CHECKS)}")
    return args


if __name__ == "__main__":
    run(main)
