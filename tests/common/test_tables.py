import csv
import statistics

from rsa_detectron2.common.tables import cell, mean_std, to_markdown, write_rows


def test_cells():
    assert cell(mean_std([40.0, 42.0])) == "41.0 ± 1.4"
    assert mean_std([1.0, 2.0, 4.0])[1] == statistics.stdev([1, 2, 4])
    assert cell(mean_std([40.04])) == "40.0"
    assert cell(mean_std([1.0, None])) == "–"


def test_markdown_is_aligned():
    text = to_markdown([["", "AP"], ["a|b", "41.1"], ["a long line of words alone", ""]])
    assert text.splitlines() == [
        "|      | AP   |",
        "|------|------|",
        "| a\\|b | 41.1 |",
        "| a long line of words alone |      |",
    ]


def test_csv(tmp_path):
    write_rows(tmp_path / "t.csv", ["a", "b"], [["ä,", None], [1, 2.5]])
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["a", "b"], ["ä,", ""], ["1", "2.5"]]
