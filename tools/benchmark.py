#!/usr/bin/env python3
"""How fast this machine runs the parts of pre-training. Prints a table, then its rows as JSON lines.

    tools/benchmark.py data --data PATH    # a loader's worker: this project, PIL pipelines, decoding alone
    tools/benchmark.py augment             # the aggressive stage: this project, torchvision, kornia
    tools/benchmark.py step                # one optimizer step, by its parts: RSA, BYOL, SimSiam
    tools/benchmark.py step --config-file pretrain/cifar10_rsa_R18.yaml --epoch-images 50000
    tools/benchmark.py optim               # LARS and the EMA, over all tensors at once and one by one

Variants take turns within one run; every figure is the median over --repeats. Without a GPU the
defaults of augment, step and optim are smaller, and a line says so. docs/benchmarks.md has figures.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import PIL
import torch
import torchvision

from rsa_detectron2.common.cli import run
from rsa_detectron2.common.distributed import device
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.tables import to_markdown
from rsa_detectron2.pretrain.data.images import native_name
from rsa_detectron2.tools.benchmarks import augment, data, optim, options, step

BENCHMARKS = {"data": data, "augment": augment, "step": step, "optim": optim}


def main() -> None:
    args = parse()
    machine = describe_machine()
    name, *versions = machine.items()
    print(", ".join([name[1], *(f"{what} {value}" for what, value in versions)]), flush=True)
    if device().type == "cpu" and "cfg" in args and not args.config_file:
        print("no GPU: defaults are small; --help lists the options that change them")
    rows = BENCHMARKS[args.benchmark].measure(args)
    cells = [list(rows[0]), *([as_text(value) for value in row.values()] for row in rows)]
    print(f"\n{to_markdown(cells)}")
    lines = "".join(json.dumps({"benchmark": args.benchmark, **machine, **row}) + "\n" for row in rows)
    print(lines, end="")
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(lines)


def parse() -> argparse.Namespace:
    """Raises InputError for an option that the benchmark does not have."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="|".join(BENCHMARKS))
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.__doc__, description=benchmark.__doc__)
        benchmark.add_options(command)
        options.add_common(command)
    given = sys.argv[1:]
    if given and given[0].startswith("-") and given[0] not in ("-h", "--help"):
        raise InputError(f"options follow the benchmark: tools/benchmark.py step {given[0]} ...")
    args, unknown = parser.parse_known_args(given)
    if unknown:
        raise InputError(
            f"{args.benchmark} has no option {' '.join(unknown)}: "
            f"tools/benchmark.py {args.benchmark} --help lists what it has"
        )
    if "config_file" in args:
        options.resolve(args)
    return args


def describe_machine() -> dict:
    return {
        "machine": torch.cuda.get_device_name() if device().type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "decoder": native_name,
    }


def cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def as_text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(main)
