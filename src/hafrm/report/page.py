"""`hafrm report`: folders in, one self-contained page out. Nothing is fetched, and no script is in it.

Its content security policy forbids any connection: even text that was not escaped could load nothing.
"""

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from hafrm.atomic import atomic_write, check_writable, write_errors
from hafrm.errors import ConfigError
from hafrm.report.run_files import Material, read_material

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
    check_writable(out)
    page = render_material(read_material(folders)).encode("utf-8", "replace")
    with write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, page)
    return len(page)


def render_material(material: Material) -> str:
    """The page as HTML; a section appears where its data is there."""
    # these need the extra
    from hafrm.report import result_sections, run_sections  # noqa: PLC0415
    from hafrm.report.html import render_page  # noqa: PLC0415

    makers = (
        run_sections.summary_section,
        result_sections.accuracy_section,
        result_sections.benchmarks_section,
        result_sections.study_section,
        result_sections.best_of_n_section,
        run_sections.rlhf_section,
        result_sections.policies_section,
        run_sections.training_section,
        result_sections.calibration_section,
        result_sections.length_section,
        result_sections.diagnosis_section,
        result_sections.examples_section,
        run_sections.provenance_section,
    )
    sections = [section for make in makers if (section := make(material)).blocks]
    by = "hafrm"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        by += f" {importlib.metadata.version('hafrm')}"
    return render_page(
        sections,
        names=[folder.name for folder in material.folders],
        by=by,
        colours=material.colours,
    )
