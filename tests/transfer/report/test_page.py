from PIL import Image

from rsa_detectron2.transfer.report.page import write_report


def test_page_is_self_contained(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    write_report(
        tmp_path / "page",
        "A <title>",
        [("Words", "a < b"), ("Table", [["", "AP"], ["rsa & co", "41.1"]]), ("Picture", tmp_path / "p.png")],
    )
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "A &lt;title&gt;" in page and "a &lt; b" in page and "<td>rsa &amp; co<td>41.1" in page
    assert 'src="data:image/png;base64,' in page and "p.png" not in page
    text = (tmp_path / "page" / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# A <title>\n\n## Words\n\na < b\n") and "| rsa & co | 41.1 |" in text
    assert "![Picture](../p.png)" in text
