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


def outside(page: str) -> re.Pattern[str]:
    """Links from a page, a path within docs/, into the checkout."""
    up = r"\.\./" * (page.count("/") + 1)
    return re.compile(rf"\]\({up}([^)#.][^)#]*)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add cli.md, written by the commands themselves, and copies of linked files under source/."""
    command = get_command(app)
    text = get_docs_for_click(
        obj=command, ctx=typer.Context(command), name="hafrm", title="Commands"
    )
    files.append(File.generated(config, "cli.md", content=text))
    docs = Path(config["docs_dir"])
    pages = {page.relative_to(docs).as_posix(): page.read_text() for page in docs.rglob("*.md")}
    for name in sorted(
        {link for page, text in pages.items() for link in outside(page).findall(text)}
    ):
        if (ROOT / name).is_file():  # if not, the strict build reports a broken link
            files.append(File.generated(config, f"source/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of docs/ go to those copies."""
    name = page.file.src_uri
    return outside(name).sub(rf"]({'../' * name.count('/')}source/\1)", markdown)
