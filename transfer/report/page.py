"""A report as Markdown and as HTML, one file that can be mailed."""

import base64
import html
import os
from pathlib import Path

from rsa_detectron2.common.tables import to_markdown

Body = str | list[list[str]] | Path

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse }
th, td { padding: .3em .9em; text-align: right }
td:first-child { text-align: left }
thead { border-block: 1px solid }
tbody { border-bottom: 1px solid }
img { max-width: 100% }
""".strip()


def write_report(
    folder: str | Path, title: str, sections: list[tuple[str, Body]], name: str = "report"
) -> None:
    """Write ``name``.md and ``name``.html into ``folder``.

    sections: (heading, body) pairs. A body is text, a table (a header and rows of strings), or the
    path of a PNG, which the HTML file embeds.
    """
    folder = Path(folder)
    markdown, page = [f"# {title}\n"], [f"<h1>{html.escape(title)}</h1>"]
    for heading, body in sections:
        markdown += [f"## {heading}\n", body_markdown(heading, body, folder)]
        page += [f"<h2>{html.escape(heading)}</h2>", body_html(heading, body)]
    head = '<!doctype html><html lang="en"><meta charset="utf-8">'
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>\n"
    folder.mkdir(parents=True, exist_ok=True)
    escaped = {"encoding": "utf-8", "errors": "backslashreplace"}  # names of files need not be UTF-8
    (folder / f"{name}.md").write_text("\n".join(markdown), **escaped)
    (folder / f"{name}.html").write_text(head + "\n".join(page) + "\n</html>\n", **escaped)


def body_markdown(heading: str, body: Body, folder: Path) -> str:
    if isinstance(body, Path):
        link = os.path.relpath(body, folder).replace(os.sep, "/")
        return f"![{heading}]({link})\n"
    return f"{body}\n" if isinstance(body, str) else to_markdown(body)


def body_html(heading: str, body: Body) -> str:
    if isinstance(body, Path):
        data = base64.b64encode(body.read_bytes()).decode()
        return f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{data}">'
    if isinstance(body, str):
        return f"<p>{html.escape(body)}</p>"
    head, *rows = [[html.escape(text) for text in row] for row in body]
    lines = "".join(f"<tr><td>{'<td>'.join(row)}</tr>" for row in rows)
    return f"<table><thead><tr><th>{'<th>'.join(head)}</tr></thead><tbody>{lines}</tbody></table>"
