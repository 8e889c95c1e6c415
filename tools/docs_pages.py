"""A hook of MkDocs (`make docs`): the page cli.md, and the files outside docs/ that pages link to."""

import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click
from typer.main import get_command

from hafrm.cli import app

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)\)")  # a link from docs/ into the checkout


def on_files(files: Files, config: Any) -> Files:
    """Add cli.md, written by the commands themselves, and copies of linked files under source/."""
    command = get_command(app)
    text = get_docs_for_click(
        obj=command, ctx=typer.Context(command), name="hafrm", title="Commands"
    )
    files.append(File.generated(config, "cli.md", content=text))
    pages = "".join(page.read_text() for page in sorted(Path(config["docs_dir"]).glob("*.md")))
    for name in sorted(set(OUTSIDE.findall(pages))):
        if (ROOT / name).is_file():  # if not, the strict build reports a broken link
            files.append(File.generated(config, f"source/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of docs/ go to those copies."""
    return OUTSIDE.sub(r"](source/\1)", markdown)
