"""`hafrm report`: folders in, one self-contained page out. Nothing is fetched, and no script is in it.

The page is complete or absent; it forbids itself any connection, so that even text that got through
unescaped could load nothing.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hafrm.atomic import atomic_write
from hafrm.errors import ConfigError
from hafrm.reporting.folders import Material, read_folders

if TYPE_CHECKING:
    from jinja2 import Template

EXTRA = ("matplotlib", "jinja2")


def missing_packages() -> list[str]:
    """The packages of the extra `report` that are not installed."""
    return [name for name in EXTRA if importlib.util.find_spec(name) is None]


def write_report(folders: Sequence[Path], out: Path) -> int:
    """Write the page about the folders to `out`; returns its size in bytes.

    Raises ConfigError where the extra is not installed, CheckpointError for a folder that holds nothing
    to report.
    """
    missing = missing_packages()
    if missing:
        raise ConfigError(
            f"hafrm report needs {' and '.join(missing)}: pip install 'hafrm[report]'"
        )
    page = render(read_folders(folders)).encode("utf-8", "replace")
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, page)
    return len(page)


def render(material: Material) -> str:
    """The page as HTML."""
    sections = [found for make in _makers() if (found := make(material)) is not None]
    names = [folder.name for folder in material.folders]
    return _template().render(
        sections=sections, names=names, subtitle=_subtitle(material), by=_by()
    )


@functools.cache
def _template() -> "Template":
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415

    environment = Environment(
        loader=PackageLoader("hafrm.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = unbroken
    return environment.get_template("page.html.j2")


def unbroken(text: str) -> str:
    """The text with no line break between a number and its per cent sign."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _subtitle(material: Material) -> str:
    """What kinds of folders the page is about."""
    nouns = {
        "training run": len(material.runs),
        "diagnosis": len(list(material.having("diagnostics"))),
        "comparison of methods": len(list(material.having("comparison"))),
        "best-of-n result": len(list(material.having("best_of_n"))),
        "RLHF run": sum(bool(folder.rlhf) for folder in material.folders),
        "comparison of RLHF runs": len(list(material.having("rlhf_comparison"))),
    }
    plural = {"diagnosis": "diagnoses", "comparison of methods": "comparisons of methods"}
    plural["comparison of RLHF runs"] = "comparisons of RLHF runs"
    parts = [
        f"{num} {noun if num == 1 else plural.get(noun, noun + 's')}"
        for noun, num in nouns.items()
        if num
    ]
    return ", ".join(parts)


def _by() -> str:
    """What wrote the page, with its version where it is installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f"hafrm {importlib.metadata.version('hafrm')}"
    return "hafrm"


def _makers() -> tuple[Callable[[Material], object], ...]:
    """The sections in their order; they are loaded late, because they need the extra."""
    from hafrm.reporting.sections import (  # noqa: PLC0415
        accuracy,
        agreement,
        best_of_n,
        bias,
        calibration,
        comparison,
        noise,
        provenance,
        reading,
        representation,
        rlhf,
        summary,
        training,
    )

    return (
        *(summary.section, accuracy.section, comparison.section, best_of_n.section, rlhf.section),
        *(training.section, calibration.section, bias.section, agreement.section, noise.section),
        *(representation.section, reading.section, provenance.section),
    )
