"""AP by the number of labeled images: the fine-tunings of tools/label_fractions.py and their report."""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
from pathlib import Path

import numpy as np
from fvcore.common.config import CfgNode
from matplotlib.figure import Figure

from rsa_detectron2.common.config import find_config
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.files import write_atomically
from rsa_detectron2.common.record import flatten
from rsa_detectron2.common.tables import to_markdown, write_rows
from rsa_detectron2.tools import train_net
from rsa_detectron2.tools._plan import check_names
from rsa_detectron2.tools._steps import Step
from rsa_detectron2.transfer.config import DEFAULT_WEIGHTS, RECIPE_BATCH, torchvision_defaults
from rsa_detectron2.transfer.convert.needs import check_weights
from rsa_detectron2.transfer.convert.writers import load_weights
from rsa_detectron2.transfer.data.annotations import dataset_name, forget_datasets, load_dataset
from rsa_detectron2.transfer.data.dataset import Dataset
from rsa_detectron2.transfer.report import paper
from rsa_detectron2.transfer.report.runs import load_results
from rsa_detectron2.transfer.report.tables import COLUMNS, Row, own_row, table_cells

RANDOM = "random"
# Rows that need no --weights where tools/convert_to_d2.py has left theirs. Those of RSA are the config's.
ROWS = {RANDOM: "", "supervised": "output/weights/supervised_r50.pkl", "rsa": None}
SHOWN = ("box AP", "mask AP")


class LabelFractions:
    """The fine-tunings of each row, fraction and seed, and the report of what they leave in ``folder``."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Raises InputError for wrong options, before anything runs."""
        self.args, self.folder, self.seeds = args, Path(args.output_dir), range(args.seeds)
        given = ["--config-file", args.config_file, "--engine", args.engine, *args.overrides]
        for name, files in (("data", args.data), ("train", args.train), ("val", args.val)):
            given += [f"--{name}", *files] if files else []
        self.given = train_net.parse(given)
        if not (self.given.train and self.given.val):
            raise InputError("no data set: give --data FOLDER, or --train JSON IMAGES and --val JSON IMAGES")
        torchvision = args.engine == "torchvision"
        self.defaults = torchvision_defaults() if torchvision else train_net.import_detectron2()[1]()
        cfg, dataset = self.config(), self.dataset
        masks = cfg.MODEL.MASK_ON
        self.labeled = [image["id"] for image in dataset.images if dataset.objects(image, masks)]
        self.images = self.count()  # {fraction in percent: number of images}
        self.configs = {fraction: self.config(images) for fraction, images in self.images.items()}
        self.weights = self.find_weights(cfg.MODEL.WEIGHTS)
        self.provenance = {row: self.check(cfg, path) for row, path in self.weights.items()}

    @property
    def dataset(self) -> Dataset:
        """The whole training set."""
        return load_dataset(dataset_name(*self.given.train))

    def config(self, images: int | None = None) -> CfgNode:
        """The configuration of a fine-tuning on so many labeled images; None: on all."""
        cfg = self.defaults.clone()
        cfg.MODEL.WEIGHTS = DEFAULT_WEIGHTS
        with contextlib.redirect_stdout(io.StringIO()):  # each fine-tuning prints its schedule itself
            train_net.configure(cfg, self.given, images)
        return cfg

    def count(self) -> dict[float, int]:
        """{fraction in percent: number of images}, the smallest first. Raises InputError."""
        if not self.labeled:
            raise InputError(f"{self.given.train[0]} has no image with a usable annotation")
        found = {}
        for fraction in sorted(set(self.args.fractions)):
            images = max(1, round(len(self.labeled) * fraction / 100))
            if images in found.values():
                raise InputError(
                    f"--fractions: {fraction:g} % of {len(self.labeled)} labeled images are as many as a "
                    f"smaller fraction, {images}: leave one of the two out"
                )
            found[fraction] = images
        return found

    def find_weights(self, configured: str) -> dict[str, str]:
        """{row: file of its weights, "" for random}. Raises InputError for a row whose file is not there."""
        named = dict(self.args.weights)
        files = ROWS | {"rsa": configured} | named
        wanted = self.args.rows or files
        check_names("the table", "row", wanted, files)
        found = {}
        for row in (row for row in files if row in wanted):
            lacks = f"{row} needs --weights {row}=FILE, a file of tools/convert_to_d2.py"
            if row == RANDOM or Path(files[row]).is_file():
                found[row] = files[row]
            elif self.args.rows or row in named:
                raise InputError(f"{lacks}: there is no {files[row]}")
            else:
                print(f"left out: {lacks}")
        return found

    def check(self, cfg: CfgNode, weights: str) -> dict | None:
        """The provenance of weights; None of random ones. Raises InputError if they do not fit the config."""
        if not weights:
            return None
        cfg, provenance = cfg.clone(), load_weights(weights)[1]
        cfg.MODEL.WEIGHTS = weights
        check_weights(cfg, provenance)
        return provenance

    def place(self, row: str, fraction: float, seed: int) -> Path:
        return self.folder / f"seed{seed}" / f"{fraction:g}" / row

    def train_file(self, fraction: float, seed: int) -> Path:
        """The annotation file of a fraction; that of all images is the user's own."""
        if self.images[fraction] == len(self.labeled):
            return Path(self.given.train[0])
        return self.folder / f"seed{seed}" / f"{fraction:g}.json"

    def content(self, fraction: float, seed: int) -> bytes:
        """The content of that file. A class keeps its place where none of its objects are drawn."""
        if self.images[fraction] == len(self.labeled):
            return self.train_file(fraction, seed).read_bytes()
        dataset, order = self.dataset, np.random.default_rng(seed).permutation(self.labeled)
        drawn = set(order[: self.images[fraction]].tolist())
        part = dataclasses.replace(
            dataset,
            images=[image for image in dataset.images if image["id"] in drawn],
            annotations=[each for each in dataset.annotations if each["image_id"] in drawn],
        )
        return json.dumps(part.coco()).encode()

    def runs(self) -> dict[Path, tuple[str, float, int]]:
        """{folder: (row, fraction, seed)} of the fine-tunings, in their order."""
        return {
            self.place(*run): run
            for seed in self.seeds
            for fraction in self.images
            for run in ((row, fraction, seed) for row in self.weights)
        }

    def steps(self) -> list[Step]:
        for fraction, images in self.images.items():
            solver = self.configs[fraction].SOLVER
            schedule = f"{solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH}"
            epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / images
            print(f"{fraction:g} % of the labeled images: {images}, {schedule}, {epochs:.1f} epochs")
        return [self.fine_tuning(*run) for run in self.runs().values()]

    def fine_tuning(self, row: str, fraction: float, seed: int) -> Step:
        args, folder = self.args, self.place(row, fraction, seed)
        command = ["tools/train_net.py", "--config-file", args.config_file, "--resume"]
        command += ["--engine", args.engine, "--num-gpus", args.num_gpus]
        command += ["--accumulate", args.accumulate] if args.accumulate else []
        command += ["--train", self.train_file(fraction, seed), self.given.train[1], "--val", *self.given.val]
        command += [*args.overrides, "MODEL.WEIGHTS", self.weights[row], "SEED", seed, "OUTPUT_DIR", folder]
        return Step(folder / "results.json", list(map(str, command)), hours=self.hours(fraction))

    def hours(self, fraction: float) -> float:
        """V100-hours of a fine-tuning, if it were one of the paper's Mask R-CNN R50-FPN."""
        cost, solver = paper.load()["tables"]["table5"]["cost"], self.configs[fraction].SOLVER
        return cost["seconds"] * cost["gpus"] / 3600 * solver.MAX_ITER * solver.IMS_PER_BATCH / RECIPE_BATCH

    def differences(self, step: Step) -> list[str]:
        """Words for everything in which the run of a finished step is not the one that the step makes."""
        row, fraction, seed = self.runs()[step.done.parent]
        results, file = load_results(step.done.parent), self.train_file(fraction, seed)
        cfg = self.configs[fraction].clone()
        cfg.DATASETS.TRAIN = (dataset_name(file, self.given.train[1]),)
        recipe = str(Path(find_config(self.args.config_file)).resolve())
        settings = tuple(flatten(cfg).items())
        found = paper.setting_differences(paper.Training("finetune", recipe, settings, 1, 0), results)
        if results["engine"] != self.args.engine:
            found.append(f"engine {results['engine']} instead of {self.args.engine}")
        if results["weights"] != self.provenance[row]:
            found.append("other weights")
        digest = hashlib.sha256(self.content(fraction, seed)).hexdigest()
        if (results["data"] or {}).get("sha256") != [digest]:
            found.append("other images or annotations")
        return found

    def prepare(self) -> None:
        """Write the annotation files of the fractions. Raises InputError for one that differs."""
        for fraction, seed in itertools.product(self.images, self.seeds):
            self.write_file(fraction, seed)
        forget_datasets()

    def write_file(self, fraction: float, seed: int) -> None:
        file, content = self.train_file(fraction, seed), self.content(fraction, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            write_atomically(file, lambda opened: opened.write(content))
        elif file.read_bytes() != content:
            raise InputError(
                f"{file} was drawn from other annotations: move {self.folder} away, or give another "
                "--output-dir"
            )

    def report(self) -> str:
        """Write table.csv, curve.png and report.md; returns the table in Markdown."""
        results = {
            (row, fraction): [load_results(self.place(row, fraction, seed)) for seed in self.seeds]
            for fraction in self.images
            for row in self.weights
        }
        return write_report(self.folder, results, self.images)


def write_report(folder: Path, results: dict[tuple[str, float], list[dict]], images: dict[float, int]) -> str:
    """The report of {(row, fraction): results of its seeds}; returns its table in Markdown.

    images: {fraction in percent: number of images}.
    """
    rows, lines = {}, []
    for (name, fraction), seeds in results.items():
        title = f"{fraction:g} % ({images[fraction]}), {name}"
        row = rows[name, fraction] = own_row("ap", title, dict(enumerate(seeds)))
        figures = [part for column in COLUMNS["ap"] for part in row.figures[column] or (None, None)]
        lines.append([name, fraction, images[fraction], len(seeds), *figures])
    columns = [column for name in COLUMNS["ap"] for column in (name, f"{name} std")]
    write_rows(folder / "table.csv", ["row", "percent", "images", "seeds", *columns], lines)
    plot(rows, images, folder / "curve.png")
    markdown = to_markdown(table_cells("ap", list(rows.values())))
    (folder / "report.md").write_text(
        "# AP by the number of labeled images\n\nAP in percent, mean ± sample standard deviation over the "
        "seeds. Each seed draws images of its own. A line names the fraction, in brackets the number of "
        f"images, and the weights that training started from.\n\n{markdown}\n"
        "![AP by the number of labeled images](curve.png)\n",
        encoding="utf-8",
    )
    return markdown


def plot(rows: dict[tuple[str, float], Row], images: dict[float, int], path: Path) -> None:
    """Panels for box and mask AP with a curve for each row; the bars are standard deviations."""
    names = list(dict.fromkeys(name for name, _ in rows))
    columns = [each for each in SHOWN if any(row.figures[each] for row in rows.values())] or SHOWN[:1]
    figure = Figure(figsize=(5 * len(columns), 4), dpi=150, layout="constrained")
    for ax, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns):
        for place, name in enumerate(names):
            shift = 1.03 ** (place - (len(names) - 1) / 2)  # so that no bar hides another
            known = {n: row.figures[column] for n in images if (row := rows[name, n]).figures[column]}
            means, stds = [mean for mean, _ in known.values()], [std or 0 for _, std in known.values()]
            ax.errorbar(
                [images[n] * shift for n in known], means, stds, fmt="o-", ms=4, capsize=3, label=name
            )
        ax.set_xscale("log")  # after the curves: an empty axis would keep 1 in view
        ax.set_xticks([*images.values()], [f"{number}\n{n:g} %" for n, number in images.items()])
        ax.minorticks_off()
        ax.set(title=column, xlabel="labeled images", ylabel="AP (%)", ylim=(0, None))
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path)
