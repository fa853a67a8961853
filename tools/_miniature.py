"""Table 5 in miniature: tools/reproduce.py miniature.

The paper's claim is about transfer. Each method pre-trains a ResNet-18 on the quick start's drawn images
without labels, by its recipe configs/pretrain/miniature_<method>_R18.yaml; their classes are pairs of a form
and a color. Then the quick start's Mask R-CNN FPN is fine-tuned on drawn images in COCO's format twice: with
every layer trained, and with the backbone frozen, where a feature that pre-training has lost cannot be
learned again.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from rsa_detectron2.common.distributed import device
from rsa_detectron2.common.tables import to_markdown, write_rows
from rsa_detectron2.tools._points import plot_seeds
from rsa_detectron2.tools._steps import Step
from rsa_detectron2.tools.quickstart import SIZES, draw_toys
from rsa_detectron2.transfer.report import paper
from rsa_detectron2.transfer.report.runs import load_results
from rsa_detectron2.transfer.report.tables import COLUMNS, Row, own_row, read_run, table_cells

RANDOM, SUPERVISED = "random", "supervised"
DETECTOR = "transfer/quickstart_mask_rcnn_R18_FPN.yaml"
FREEZE_AT = {"trained": 0, "frozen": 5}  # what becomes of the backbone
SHOWN = {"box AP": "bbox", "mask AP": "segm"}  # in the picture and in the comparison


class MiniatureTest:
    """The steps of the test for some of its rows, and the report of what they leave in ``folder``."""

    ROWS = {
        RANDOM: "random weights",
        "simsiam": "SimSiam",
        "byol": "BYOL AA",
        "byol_aw": "BYOL AW",
        "rsa_fixed_beta": "RSA, β fixed",
        "rsa": "RSA, β fades out",
        SUPERVISED: "supervised classification",
    }
    SEEDS = 3
    # On one core of an AMD EPYC, estimated from runs of 50 steps and 20 iterations.
    HOURS = {"pretrain": 4.5 / 60, SUPERVISED: 1.5 / 60, "trained": 2 / 60, "frozen": 1.2 / 60}
    FINE_TUNING = ()  # KEY, VALUE, ... on top of the quick start's

    def __init__(
        self,
        folder: Path,
        rows: Sequence[str],
        seeds: int,
        overrides: Sequence[str],
        engine: str = "torchvision",
    ) -> None:
        """overrides: [KEY, VALUE, ...] of every pre-training; engine: of every fine-tuning."""
        self.folder, self.overrides, self.engine = folder, list(overrides), engine
        self.rows, self.seeds = list(rows), range(seeds)
        self.workers = [] if device().type == "cuda" else ["--workers", 0]

    def steps(self) -> list[Step]:
        steps = []
        for seed in self.seeds:
            for row in self.rows:
                if row != RANDOM:
                    steps += [self.pre_training(row, seed), self.conversion(row, seed)]
                steps += [self.fine_tuning(row, seed, backbone) for backbone in FREEZE_AT]
        return steps

    def place(self, row: str, seed: int) -> Path:
        return self.folder / f"seed{seed}" / row

    def pre_training(self, row: str, seed: int) -> Step:
        folder = self.place(row, seed)
        command = ["tools/_supervised.py" if row == SUPERVISED else "tools/pretrain.py"]
        command += ["--config-file", recipe(row), "--data", self.folder / "images" / "train"]
        command += ["--output-dir", folder, "--seed", seed, *self.workers]
        # One process, so that BatchNorm sees the same images on any machine.
        command += ([] if row == SUPERVISED else ["--num-processes", 1]) + self.overrides
        hours = self.HOURS.get(row, self.HOURS["pretrain"])
        return Step(folder / "model_final.pth", list(map(str, command)), hours=hours)

    def conversion(self, row: str, seed: int) -> Step:
        source, done = (self.place(row, seed) / name for name in ("model_final.pth", "backbone.pkl"))
        named = ["--method", SUPERVISED] if row == SUPERVISED else []
        return Step(done, ["tools/convert_to_d2.py", str(source), str(done), *named], source)

    def fine_tuning(self, row: str, seed: int, backbone: str) -> Step:
        folder, coco = self.place(row, seed) / backbone, self.folder / "coco"
        weights = None if row == RANDOM else self.place(row, seed) / "backbone.pkl"
        command = ["tools/train_net.py", "--config-file", DETECTOR, "--resume", "--engine", self.engine]
        for split in ("train", "val"):
            command += [f"--{split}", coco / f"{split}.json", coco / "images"]
        command += [*self.settings(backbone), "MODEL.WEIGHTS", weights or "", "SEED", seed]
        command += ["OUTPUT_DIR", folder, *(["DATALOADER.NUM_WORKERS", 0] if self.workers else [])]
        return Step(folder / "results.json", list(map(str, command)), weights, self.HOURS[backbone])

    def settings(self, backbone: str) -> list[object]:
        """KEY, VALUE, ... of a fine-tuning besides its files and its seed."""
        return ["MODEL.BACKBONE.FREEZE_AT", FREEZE_AT[backbone], "TEST.EVAL_PERIOD", 0, *self.FINE_TUNING]

    def differences(self, step: Step) -> list[str]:
        """Words for everything in which the run of a finished step is not the one that the step makes."""
        folder = step.done.parent
        if step.done.name == "model_final.pth":
            training = self.training("pretrain", recipe(folder.name), self.overrides)
            return paper.setting_differences(training, read_run(folder))
        if step.done.name != "results.json":
            return []
        results, files = load_results(folder), {}
        for key, split in (("DATASETS.TRAIN", "train"), ("DATASETS.TEST", "val")):
            files[key] = [f"{split}.json"]
        given = [*self.settings(folder.name), *(word for pair in files.items() for word in pair)]
        found = paper.setting_differences(self.training("finetune", DETECTOR, given), results)
        if results["engine"] != self.engine:
            found.append(f"engine {results['engine']} instead of {self.engine}")
        return found

    def training(self, kind: str, recipe: str, overrides: Sequence[object]) -> paper.Training:
        pairs = zip(overrides[::2], map(paper.literal, overrides[1::2]))
        return paper.Training(kind, recipe, tuple(pairs), seeds=len(self.seeds), bn=0)

    def prepare(self) -> None:
        """Draw the images, unless they are there. Raises InputError for a folder of other images."""
        draw_toys(self.folder, SIZES)

    def report(self) -> str:
        """Write table.csv, miniature.png and report.md; returns the tables in Markdown."""
        results = {
            backbone: {
                row: [load_results(self.place(row, seed) / backbone) for seed in self.seeds]
                for row in self.rows
            }
            for backbone in FREEZE_AT
        }
        return write_report(self.folder, results)


def recipe(row: str) -> str:
    """The recipe of a row's pre-training. Supervised classification takes all but the method from RSA's."""
    return f"pretrain/miniature_{'rsa' if row == SUPERVISED else row}_R18.yaml"


def write_report(folder: Path, results: dict[str, dict[str, list[dict]]]) -> str:
    """The report of {what becomes of the backbone: {row: results of its seeds}}; returns its tables and its
    sentence in Markdown."""
    tables = {
        backbone: {
            row: own_row("ap", MiniatureTest.ROWS[row], dict(enumerate(seeds))) for row, seeds in rows.items()
        }
        for backbone, rows in results.items()
    }
    columns = [column for name in COLUMNS["ap"] for column in (name, f"{name} std")]
    lines = []
    for backbone, rows in tables.items():
        for name, row in rows.items():
            means = [part for ap in COLUMNS["ap"] for part in row.figures[ap] or (None, None)]
            lines.append([backbone, name, len(row.runs), *means])
    write_rows(folder / "table.csv", ["backbone", "row", "seeds", *columns], lines)
    plot(results, folder / "miniature.png")
    parts = [
        f"Backbone {backbone}:\n\n{to_markdown(table_cells('ap', list(rows.values())))}"
        for backbone, rows in tables.items()
    ]
    text = "\n".join(filter(None, [*parts, comparison(tables)])).rstrip()
    (folder / "report.md").write_text(
        "# Table 5 in miniature\n\nAP in percent, mean ± sample standard deviation over the seeds.\n\n"
        f"{text}\n\n![box and mask AP by method](miniature.png)\n",
        encoding="utf-8",
    )
    return text


def comparison(tables: dict[str, dict[str, Row]]) -> str:
    """One sentence: in which figures RSA is ahead of BYOL AA, or behind it, beyond the deviation.

    That is: the means differ by more than the larger of the two deviations. "" without one of the rows.
    """
    words = []
    for backbone, rows in tables.items():
        if not {"rsa", "byol"} <= rows.keys():
            return ""
        for name in SHOWN:
            (rsa, deviation), (byol, other) = rows["rsa"].figures[name], rows["byol"].figures[name]
            if deviation is None:
                return "One seed has no deviation, so it does not say whether RSA is ahead of BYOL AA."
            limit, difference = max(deviation, other), rsa - byol
            outcome = "within the deviation"
            if abs(difference) > limit:
                outcome = "ahead" if difference > 0 else "behind"
            words.append(f"{name}, backbone {backbone}: {outcome} ({difference:+.1f}, deviation {limit:.1f})")
    return f"RSA beside BYOL AA, by the larger of their two deviations: {'; '.join(words)}."


def plot(results: dict[str, dict[str, list[dict]]], path: Path) -> None:
    """A panel for each fate of the backbone."""
    rows = len(results["trained"])
    figure = Figure(figsize=(9, 0.42 * rows + 1.3), dpi=150, layout="constrained")
    for ax, (backbone, by_row) in zip(figure.subplots(1, len(results), sharey=True), results.items()):
        figures = {
            name: [[run["ap"][task]["AP"] for run in runs] for runs in by_row.values()]
            for name, task in SHOWN.items()
        }
        plot_seeds(ax, figures, [MiniatureTest.ROWS[row] for row in by_row])
        ax.set(title=f"backbone {backbone}", xlabel="AP (%)")
    figure.axes[-1].legend(fontsize=8, loc="best")
    figure.savefig(path)
