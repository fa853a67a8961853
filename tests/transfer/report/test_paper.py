"""configs/paper.yaml: its numbers against the page that they were copied from, the costs, the runs that rows
share, and that the numbers occur nowhere else."""

import re

import pytest

from rsa_detectron2.transfer.report import paper
from tests.conftest import ROOT

PAGE = ROOT.parent / "shared" / "paper" / "TABLES.md"
TABLES = paper.load()["tables"]


def page():
    if not PAGE.is_file():
        pytest.skip(f"no {PAGE.name} beside the project")
    return PAGE.read_text()


def published(table):
    """The published figures of a table as text, row by row."""
    return [
        [str(figure) for figure in row["published"] if figure is not None]
        for row in TABLES[table]["rows"].values()
        if "published" in row
    ]


@pytest.mark.parametrize("number", [1, 2, 7])
def test_numbers_of_a_table_on_the_page(number):
    section = page().split(f"## Table {number}")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.split("|")[2:-1]]
        for line in section.splitlines()
        if line.startswith("| ")
    ]
    rows = [row for row in rows if all(re.match(r"\d", cell) for cell in row)]
    assert rows == published(f"table{number}")


@pytest.mark.parametrize("number, column", [(5, 0), (6, 1)])
def test_numbers_of_detection_on_the_page(number, column):
    section = page().split("## Tables 5 and 6")[1].split("\n## ")[0]
    rows = [line.split("|")[2:4] for line in section.splitlines() if re.match(r"\| .*\d\d\.\d", line)]
    assert [row[column].split() for row in rows] == published(f"table{number}")


def test_numbers_of_the_other_tables_on_the_page():
    text = page()
    three = text.split("## Table 3")[1].split("\n## ")[0]
    assert re.findall(r"(\d\d\.\d) / (\d\d\.\d)", three) == [tuple(row) for row in published("table3")]
    four = " ".join(text.split("## Table 4")[1].split("\n## ")[0].split())
    quotations = re.findall(r"(\S+), (\d+), (\d+), (\d\d\.\d)[.*]", four)
    assert len(quotations) == 14
    rows = [row for row in TABLES["table4"]["rows"].values() if "method" not in row]
    assert [(str(b), str(e), str(row["published"][0])) for row in rows for _, b, e in [row["facts"]]] == [
        (batch, epochs, top1) for _, batch, epochs, top1 in quotations
    ]
    assert re.findall(r"\d+ epochs (\d\d\.\d)", four) == [row[0] for row in published("table4")[-2:]]
    eight = text.split("## Table 8")[1].split("\n## ")[0]
    assert re.findall(r"\d\d\.\d(?: ± \d\.\d)?", eight) == sum(published("table8"), [])
    points = text.split("## Figure 3")[1]
    assert set(sum(published("figure3"), [])) == set(re.findall(r"\d\d\.\d", points))


def test_cost_of_each_length():
    """The page's V100-hours: RSA on each data set, by Table 7 and the number of images."""
    cost = {
        (cell.training.dataset, cell.training.settings["SOLVER.EPOCHS"]): cell.training.hours
        for table in ("table2", "table3", "table4")
        for cell in paper.cells(table)
        if cell.training and cell.row.startswith("rsa")
    }
    wanted = {
        ("cifar10", 200): 2.9,
        ("cifar10", 800): 11.5,
        ("cifar100", 200): 2.9,
        ("cifar100", 800): 11.5,
        ("stl10", 200): 19.9,
        ("stl10", 800): 79.6,
        ("tinyimagenet", 200): 19,
        ("tinyimagenet", 800): 76,
        ("imagenet100", 100): 20.8,
        ("imagenet100", 200): 41.6,
        ("imagenet", 100): 210,
        ("imagenet", 200): 420,
    }
    assert cost == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize(
    "table, runs, hours",
    [
        # BYOL and RSA: 2 x 3 seeds of CIFAR-10 and -100, of STL-10, of Tiny ImageNet, and one of
        # ImageNet-100, each twice.
        (
            "table1",
            20,
            2 * (6 * 2.825 + 3 * 19.4 + 3 * 18.48 + 19) + 2 * (6 * 2.875 + 3 * 19.9 + 3 * 18.95 + 20.8),
        ),
        (
            "table2",
            40,
            4 * (6 * 2.825 + 2 * 11.3 + 3 * 19.4 + 77.6 + 3 * 18.48 + 73.9)
            + 6 * 2.875
            + 2 * 11.5
            + 3 * 19.9
            + 79.6
            + 3 * 18.95
            + 75.8,
        ),
        ("table3", 10, 4 * 57 + 62.4),
        ("table4", 2, 631),
        ("table5", 10, 690),
        ("table6", 10, 1380),
        ("table7", 6, 11.3 + 77.6 + 38 + 11.5 + 79.6 + 41.6),
        ("table8", 6, 3 * 2.825 + 3 * 19.4 + 38 + 3 * 2.875 + 3 * 19.9 + 41.6),
        ("figure3", 21, 11.3 + 77.6 + 19 + 6 * (11.5 + 79.6 + 20.8)),
    ],
)
def test_distinct_runs_and_total_cost(table, runs, hours):
    trainings = {cell.training.name: cell.training for cell in paper.cells(table) if cell.training}
    assert len(trainings) == runs
    assert sum(training.hours * training.seeds for training in trainings.values()) == pytest.approx(
        hours, rel=2e-3
    )


def test_rows_that_share_their_runs():
    names = {
        (cell.table, cell.row, cell.column): cell.training.name
        for table, content in TABLES.items()
        if content["shows"] in ("top1", "hours")
        for cell in paper.cells(table)
        if cell.training
    }
    for group in (
        [("table1", "byol_aa", "cifar10"), ("table2", "byol", "cifar10")],
        [
            ("table1", "byol_aa", "imagenet100"),
            ("table3", "byol", "imagenet100"),
            ("figure3", "byol", "imagenet100"),
        ],
        [("table2", "rsa", "stl10_800"), ("table7", "rsa", "stl10"), ("figure3", "beta_0.4", "stl10")],
        [("table3", "simsiam", "imagenet100_200"), ("table8", "simsiam", "imagenet100")],
        [("table1", "rsa_decay", "imagenet100"), ("figure3", "beta_0.5", "imagenet100")],
    ):
        assert len({names[place] for place in group}) == 1
    assert len(set(names.values())) == 84
    # beta_base 0.5 and 0.3
    assert names["table1", "rsa_decay", "cifar10"] != names["table2", "rsa", "cifar10"]


@pytest.mark.parametrize("schedule, table", [("1x", "table5"), ("2x", "table6")])
def test_headers_of_the_transfer_configs(schedule, table):
    for path in sorted((ROOT / "configs" / "transfer").glob(f"mask_rcnn_R50_FPN_{schedule}*.yaml")):
        text = path.read_text()
        rows = [cell for cell in paper.cells(table) if cell.training.recipe == f"transfer/{path.name}"]
        assert rows and f"#   cost       {rows[0].training.hours:.0f} V100-hours" in text
        for cell in rows:
            figures = (
                " ".join(str(mean) for mean, _ in filter(None, cell.published))
                or "– (the paper has no such row)"
            )
            assert f" {cell.title}: {figures}\n" in text


def test_published_numbers_stand_in_no_other_code():
    """Except in the headers of the configs, which are tested against the file."""
    # of AP and top-1, which are not settings
    figures = {
        match
        for match in re.findall(
            r"\d+\.\d",
            " ".join(
                str(row["published"])
                for content in TABLES.values()
                for row in content.get("rows", {}).values()
                if "published" in row
            ),
        )
        if float(match) > 20
    }
    number = re.compile(rf"(?<![\d.])(?:{'|'.join(map(re.escape, sorted(figures)))})(?![\d.])")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in ("common", "pretrain", "transfer", "tools")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text().splitlines()
        if number.search(line)
    ]
    assert not found


@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md", "docs/reproduction.md"])
def test_numbers_of_the_paper_in_the_docs(page):
    """Every figure that a page attributes to the paper is in the file."""
    known = {
        figure
        for content in TABLES.values()
        for row in content.get("rows", {}).values()
        if "published" in row
        for figure in re.findall(r"\d+\.\d", str(row["published"]))
    }
    said = " ".join(re.findall(r"[Tt]he paper's[^.]*?\d\d\.\d.*?(?:\n\n|$)", (ROOT / page).read_text(), re.S))
    assert set(re.findall(r"(?<![\d.×])\d\d\.\d(?![\d.%])", said)) <= known
