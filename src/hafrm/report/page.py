"""`hafrm report`: folders in, one self-contained page out, which fetches nothing and contains no script.

Its content security policy forbids any connection: even text that was not escaped could load nothing.
"""

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from hafrm.atomic import atomic_write, check_writable
from hafrm.errors import ConfigError
from hafrm.report.run_files import Material, read_material

EXTRA = ("matplotlib", "jinja2")


def missing_packages() -> list[str]:
    """The packages of the extra `report` that are not installed."""
    return [name for name in EXTRA if importlib.util.find_spec(name) is None]


def write_report(folders: Sequence[Path], out: Path) -> int:
    """Write the page about the folders to `out`; returns its size in bytes.

    Raises ConfigError if the extra is not installed, CheckpointError for a folder with nothing to report.
    """
    missing = missing_packages()
    if missing:
        raise ConfigError(f"hafrm report needs {', '.join(missing)}: pip install 'hafrm[report]'")
    check_writable(out)
    page = render_material(read_material(folders)).encode("utf-8", "replace")
    atomic_write(out, page)
    return len(page)


def render_material(material: Material) -> str:
    """The page as HTML; a section appears if there is data for it."""
    # these need the extra
    from hafrm.report import result_sections as of_results  # noqa: PLC0415
    from hafrm.report import run_sections as of_runs  # noqa: PLC0415
    from hafrm.report.html import PageSection, render_page  # noqa: PLC0415

    makers = {
        ("summary", "Summary"): of_runs.summary_section,
        ("accuracy", "Accuracy"): of_results.accuracy_section,
        ("benchmarks", "Benchmarks"): of_results.benchmarks_section,
        ("comparison", "Methods"): of_results.study_section,
        ("best-of-n", "Best of n"): of_results.best_of_n_section,
        ("rlhf", "RLHF"): of_runs.rlhf_section,
        ("policies", "Policies"): of_results.policies_section,
        ("training", "Training"): of_runs.training_section,
        ("calibration", "Calibration"): of_results.calibration_section,
        ("length", "Length"): of_results.length_section,
        ("diagnosis", "Diagnosis"): of_results.diagnosis_section,
        ("examples", "Examples"): of_results.examples_section,
        ("provenance", "Provenance"): of_runs.provenance_section,
    }
    sections = []
    for (key, title), make in makers.items():
        lead = "" if key == "summary" else " ".join((make.__doc__ or "").split())
        if blocks := tuple(make(material)):
            sections.append(PageSection(key, title, lead, blocks))
    by = "hafrm"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        by += f" {importlib.metadata.version('hafrm')}"
    names = [folder.name for folder in material.folders]
    return render_page(sections, names=names, by=by, colours=material.colours)
