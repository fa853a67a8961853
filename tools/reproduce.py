#!/usr/bin/env python3
"""A table of the paper in one command: runs what is missing, skips what is done, ends in a report beside the paper.

    tools/reproduce.py table1 --rows cifar10_rsa cifar10_byol --seeds 3
    tools/reproduce.py table5 --dry-run                  # what would run, and what it costs
    tools/reproduce.py table5 --rows rsa --num-gpus 8
    tools/reproduce.py table6 --rows random msra rsa --seeds 3 --num-gpus 4

Stopped at any point, the same command goes on; what several tables need is run once. The rows of other methods need
their authors' checkpoints, converted once with tools/convert_to_d2.py; RSA's takes output/weights/rsa_r50.pkl if it is
there, and else pre-trains.
"""

import argparse
import ast
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools._cli import ROOT, run  # noqa: E402
from transfer.config import InputError  # noqa: E402
from transfer.report import AUTHORS, CONFIGS, FREE, ROW_FORMATS, RSA_STEPS, recipe_settings, row_of_folder  # noqa: E402
from transfer.results import load_results, settings  # noqa: E402


@dataclass(frozen=True)
class Step:
    """A command, and the file that says that it has run; both with {seed}, {gpus}, {out} (one table's folder) and {runs}
    (pre-trainings, which tables share).

    gpu_hours: an estimate, of a V100. A step without a command is the user's: ``how`` says what to do.
    """

    done: str
    command: str = ""
    gpu_hours: float = 0.0
    how: str = ""


@dataclass(frozen=True)
class Table:
    """rows: {name: the steps that lead to it, the last of which leaves its figures}; report: command that takes the
    folders of the last steps; without one, the last steps' files are the report."""

    rows: dict
    report: str = ""


OWN_RUN = "output/pretrain/model_final.pth"  # where tools/pretrain.py leaves it by itself


def pretraining(recipe, gpu_hours, seed="{seed}"):
    folder = f"{{runs}}/seed{seed}/{recipe}"
    command = f"tools/pretrain.py --config-file pretrain/{recipe}.yaml OUTPUT_DIR {folder} SEED {seed}"
    return Step(f"{folder}/model_final.pth", command, gpu_hours)


# MoCo's README states 53 hours on 8 V100 for 200 epochs; RSA has twice the forward and backward passes: a guess.
PRETRAIN = pretraining("imagenet_rsa_R50_200ep", 850, seed=0)
CONVERT = Step("output/weights/rsa_r50.pkl", f"tools/convert_to_d2.py {PRETRAIN.done} {{done}}")


def fine_tuning(schedule, row, config, gpu_hours, overrides=""):
    folder = f"{{out}}/seed{{seed}}/{row}"
    command = (f"tools/train_net.py --config-file transfer/mask_rcnn_R50_FPN_{schedule}{config}.yaml --resume "
               f"--num-gpus {{gpus}} {{options}} SEED {{seed}} OUTPUT_DIR {folder} {overrides} {{set}}")
    return Step(f"{folder}/results.json", command, gpu_hours)


def transfer_table(schedule, gpu_hours):
    """Table 5 or 6. gpu_hours: 90,000 or 180,000 iterations of 0.345 s on 8 V100, by Detectron2's model zoo for
    mask_rcnn_R_50_FPN_3x_syncbn, the same network with its first layers frozen."""
    rows = {"random": (fine_tuning(schedule, "random", "_random", gpu_hours),),
            "supervised": (fine_tuning(schedule, "supervised", "_supervised", gpu_hours),),
            "msra": (fine_tuning(schedule, "msra", "_msra", gpu_hours),)}
    for row in ("instdis", "pirl", "moco_v1", "moco_v2", "infomin", "byol"):
        weights = f"output/weights/{row}_r50.pkl"
        rows[row] = (Step(weights, how=f"tools/convert_to_d2.py CHECKPOINT {weights}, from its authors' ResNet-50"),
                     fine_tuning(schedule, row, "_ssl", gpu_hours, f"MODEL.WEIGHTS {weights}"))
    rows["rsa"] = (PRETRAIN, CONVERT, fine_tuning(schedule, "rsa", "", gpu_hours))
    return Table(rows, "tools/report.py")


def linear_evaluation(recipe, train_hours, linear_hours):
    """Pre-training by a recipe and linear evaluation of it, which take that many GPU-hours."""
    train = pretraining(recipe, train_hours)
    evaluate = f"tools/evaluate.py linear {train.done} --seed {{seed}} --output {{done}}"
    return train, Step(train.done.replace("model_final.pth", "linear.json"), evaluate, linear_hours)


# Per data set: what its recipes' names end in, and the GPU-hours of pre-training and of linear evaluation. Estimates,
# not measured: eight forward passes an image (two views forward and backward, two by the target), 7 TFLOP/s in float32
# on the small sets and 20 with AMP; ImageNet's as in PRETRAIN.
COSTS = {"cifar10": ("_R18", 4, 0.2), "cifar100": ("_R18", 4, 0.2), "stl10": ("_R18", 29, 0.1),
         "tinyimagenet": ("_R18", 28, 2), "imagenet100": ("_R50", 23, 0.6), "imagenet": ("_R50_200ep", 850, 6)}
BASELINES = ("simclr", "moco", "simsiam", "byol", "rsa")
BETA = ("rsa", "rsa_fixed_beta", "rsa_beta_0")


def top1_table(datasets, methods):
    rows = {}
    for dataset in datasets:
        suffix, *hours = COSTS[dataset]
        rows |= {f"{dataset}_{method}": linear_evaluation(f"{dataset}_{method}{suffix}", *hours) for method in methods}
    return Table(rows, "tools/report_top1.py")


# Images in an epoch (STL-10 with its unlabelled ones). ImageNet's batch of 2048 is for several GPUs: one takes 256.
EPOCH_IMAGES = {"cifar10": "50000", "cifar100": "50000", "stl10": "105000", "tinyimagenet": "100000",
                "imagenet100": "126689", "imagenet": "1281167 --batch-size 256"}


def time_per_epoch(dataset):
    command = (f"tools/benchmark.py step --methods byol rsa --config-file pretrain/{dataset}_rsa{COSTS[dataset][0]}.yaml "
               f"--epoch-images {EPOCH_IMAGES[dataset]} --output {{done}}")
    return (Step(f"{{out}}/{dataset}.json", command, 0.1),)


CHECKPOINT = Step(OWN_RUN, how="tools/pretrain.py --epochs 200, or copy a checkpoint there")
VIEWS = "tools/show_views.py datasets/imagenet/train --output-dir"
# Which data sets stand in which of Tables 1-4, and what Figure 3 shows, is a guess from public summaries of the paper.
TABLES = {
    "table1": top1_table(("cifar10", "cifar100"), BASELINES),
    "table2": top1_table(("stl10", "tinyimagenet"), BASELINES),
    "table3": top1_table(("imagenet100", "imagenet"), BASELINES),
    "table4": top1_table(("cifar10", "imagenet100"), ("byol", "byol_aw", *BETA)),
    "table5": transfer_table("1x", 69),
    "table6": transfer_table("2x", 138),
    "table7": Table({dataset: time_per_epoch(dataset) for dataset in EPOCH_IMAGES}),
    "table8": top1_table(("cifar10", "imagenet100"), ("simsiam", "simsiam_rsa")),
    "figure1": Table({"views": (Step("{out}/views/views.png", f"{VIEWS} {{out}}/views"),),
                      "drift": (CHECKPOINT, Step("{out}/drift/operations.png",
                                                 f"{VIEWS} {{out}}/drift --checkpoint {CHECKPOINT.done}"))}),
    "figure3": top1_table(("cifar10",), BETA),
}


def plan(table, rows, seeds, **words):
    """Rows of a table and seeds -> (its steps in the order to run, each once and filled in; those that are to run).

    What leads to a file that is there need not run: weights without the checkpoint that they came from are enough.
    """
    steps, missing = {}, []
    for seed in range(seeds):
        for row in rows:
            chain = []
            for step in table.rows[row]:
                done = step.done.format(seed=seed, **words)
                quoted = words | {name: shlex.quote(str(path)) for name, path in
                                  (("out", words["out"]), ("runs", words["runs"]), ("done", done))}
                command = shlex.join(shlex.split(step.command.format(seed=seed, **quoted)))
                chain.append(replace(step, done=done, command=command))
                if Path(done).is_file():
                    chain = chain[-1:]
            for step in chain:
                if step.done not in steps and not Path(step.done).is_file():
                    missing.append(step)
                steps.setdefault(step.done, step)
    return list(steps.values()), missing


def choose_rows(table, wanted):
    """The rows asked for, or all that can be run; a row that waits for the user is an InputError, or is left out."""
    unknown = [row for row in wanted or () if row not in table.rows]
    if unknown:
        raise InputError(f"no row {', '.join(unknown)}: choose from {', '.join(table.rows)}")
    rows = []
    for row in wanted or table.rows:
        missing = [step for step in table.rows[row] if not step.command and not Path(step.done).is_file()]
        if missing and wanted:
            raise InputError(f"row {row} needs {missing[0].done}: {missing[0].how}")
        if missing:
            print(f"left out: {row} needs {missing[0].done} ({missing[0].how})")
        else:
            rows.append(row)
    return rows


def check_options(args, table):
    """Raises InputError for an option that would have no effect."""
    for name in ("seeds", "num_gpus"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1")
    if len(args.overrides) % 2:
        raise InputError(f"--set takes KEY VALUE pairs, but {args.overrides[-1]!r} has no value")
    given = {"--num-gpus": args.num_gpus != 1, "--accumulate": args.accumulate is not None,
             "--protocol": args.protocol != "infomin", "--set": args.overrides}
    fine_tunes = any("train_net" in step.command for row in table.rows.values() for step in row)
    if any(given.values()) and not fine_tunes:
        names = ", ".join(name for name, value in given.items() if value)
        raise InputError(f"{names}: for fine-tuning, of which {args.table} has none; leave it out")


def check_weights(row, path):
    """Says so where the weights of a row will not stand beside what is published. Raises InputError for a file that is
    none, or that is of another method."""
    from transfer.convert import load_weights  # torch is slow to import, and a dry run seldom needs it

    provenance = load_weights(path)[1]
    method, step = provenance["method"], provenance["step"]
    method = provenance.get("format", method) if method == "unknown" else method
    if row == "rsa" and method != AUTHORS and (method, step) != ("rsa", RSA_STEPS):
        print(f"warning: {path} holds {method}, step {step}, not RSA's {RSA_STEPS} steps on ImageNet-1K: the report will "
              "not set its row beside the paper's")
    elif row == "rsa" and method == AUTHORS:
        print(f"{path} holds {method}, by its file's layout: that it is RSA's, of ImageNet-1K, is taken from you")
    elif method not in ROW_FORMATS.get(row_of_folder(row), (method,)):
        raise InputError(f"{path} holds weights of {method}, and row {row} takes {' or '.join(ROW_FORMATS[row_of_folder(row)])}"
                         ": convert its authors' checkpoint")


def check_results(step, overrides):
    """Raises InputError where the results that a step would leave are there, but not of its command: a trial's, say."""
    results = load_results(Path(step.done).parent)
    words = shlex.split(step.command)
    files = [ROOT / "configs" / words[words.index("--config-file") + 1]]
    if (protocol := words[words.index("--protocol") + 1]) != "infomin":
        files.append(CONFIGS / f"protocol_{protocol}.yaml")
    wanted, found = recipe_settings(*files), settings(results["config"])
    wanted = {key: value for key, value in wanted.items() if not FREE.fullmatch(key)}
    wanted |= zip(overrides[::2], map(yaml_value, overrides[1::2]))
    differ = [f"{key} {found.get(key)} and not {value}" for key, value in wanted.items() if found.get(key, value) != value]
    if results["iterations"] != found["SOLVER.MAX_ITER"] or results["eval_only"]:
        differ.insert(0, f"{results['iterations']} iterations")
    if differ:
        raise InputError(f"{step.done} is of a run with {differ[0]}: move it away, or give another --output-dir")


def yaml_value(text):
    """A VALUE of --set as it comes back from a run's config: yacs takes Python's literals."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return json.loads(json.dumps(value)) if isinstance(value, (tuple, list)) else value  # lists, as in YAML


def main():
    args = parse()
    table = TABLES[args.table]
    check_options(args, table)
    folder = Path(args.output_dir, args.table + f"_{args.protocol}" * (args.protocol != "infomin"))
    runs = Path(args.output_dir, "pretrain")
    options = f"--protocol {args.protocol}" + f" --accumulate {args.accumulate}" * bool(args.accumulate)
    rows = choose_rows(table, args.rows)
    steps, missing = plan(table, rows, args.seeds, out=folder, runs=runs, gpus=args.num_gpus, options=options,
                          set=shlex.join(args.overrides))
    for step in steps:
        if step not in missing and step.done.endswith("/results.json"):
            check_results(step, args.overrides)
    for row in rows:
        weights = [step.done for step in table.rows[row] if step.done.endswith(".pkl")]
        if weights and Path(weights[0]).is_file():
            check_weights(row, weights[0])
    if CONVERT.done in [step.done for step in missing] and Path(OWN_RUN).is_file():
        print(f"{OWN_RUN} is there: tools/convert_to_d2.py makes RSA's weights of it, and spares its pre-training")
    for step in steps:
        state = f"{step.gpu_hours:g} GPU-hours" if step in missing else "done"
        print(f"[{state}] {step.command if step in missing else step.done}")
    print(f"{len(missing)} of {len(steps)} to run, about {sum(step.gpu_hours for step in missing):g} GPU-hours of a "
          "V100 (an estimate)", flush=True)
    if args.dry_run:
        return None
    for step in missing:
        words = shlex.split(step.command)
        print(f"\n$ {shlex.join(words)}", flush=True)
        status = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]]).returncode
        if status or not Path(step.done).is_file():
            print(f"stopped with status {status}, {step.done} is not there; the same command goes on", file=sys.stderr)
            return status or 1
    if not table.report:
        return 0
    folders = [str(Path(table.rows[row][-1].done.format(seed=seed, out=folder, runs=runs)).parent)
            for row in rows for seed in range(args.seeds)]
    report = shlex.split(table.report)
    return subprocess.run([sys.executable, str(ROOT / report[0]), *report[1:], *folders,
                           "--output", str(folder / "report")]).returncode


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="default: all whose weights are there or can be had")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each row (default %(default)s)")
    parser.add_argument("--num-gpus", type=int, default=1, help="for fine-tuning; pre-training takes all")
    parser.add_argument("--accumulate", type=int, metavar="N", help="as in tools/train_net.py")
    parser.add_argument("--protocol", choices=("infomin", "moco"), default="infomin")
    parser.add_argument("--output-dir", default="output/reproduce", metavar="DIR", help="default %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and their cost, and stop")
    parser.add_argument("--set", nargs="+", dest="overrides", default=[], metavar="KEY VALUE",
                        help="for every fine-tuning, e.g. SOLVER.AMP.ENABLED True")
    return parser.parse_args()


if __name__ == "__main__":
    run(main, InputError)
