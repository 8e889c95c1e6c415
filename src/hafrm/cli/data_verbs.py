"""The verbs `data`, `report` and `demo`: describe data, report on runs, train on synthetic data."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from hafrm.atomic import check_writable
from hafrm.cli.entry import JsonFile, Sources, app, show_result
from hafrm.errors import CheckpointError, ConfigError


@app.command("data")
def data_command(  # noqa: PLR0913 - one argument is one option
    sources: Sources,
    *,
    model: Annotated[str | None, Option(help="Also count tokens, as this model does.")] = None,
    split: Annotated[float | None, Option(help="Fraction of prompts for OUT/test.jsonl.")] = None,
    out: Annotated[Path | None, Option(help="Folder for the parts of --split.")] = None,
    seed: Annotated[int, Option(help="Another seed gives another split.")] = 0,
    columns: Annotated[str, Option(help="Our name=yours: prompt=question,chosen=good,...")] = "",
    json_file: JsonFile = None,
) -> None:
    """Describe preference data and what is wrong with it; --split splits it by prompt."""
    from hafrm.data.describe import describe_data  # noqa: PLC0415
    from hafrm.data.reader import read_preferences  # noqa: PLC0415

    names = dict(part.partition("=")[::2] for part in columns.split(",") if part)
    if split is not None and out is not None:
        _write_parts(sources, split, out, seed, names)
        return
    if split is not None or out is not None:
        raise ConfigError("--split FRACTION and --out DIR belong together; give both or neither")
    encode = None
    if model is not None:
        from hafrm.data.encoding import Encoder  # noqa: PLC0415
        from hafrm.scoring.model_files import load_any_tokenizer  # noqa: PLC0415

        encode = Encoder(load_any_tokenizer(model)).encode
    data = read_preferences(sources, max_bad_fraction=1.0, columns=names)
    show_result(describe_data(data, encode), json_file)


def _write_parts(
    sources: list[str], fraction: float, out: Path, seed: int, columns: dict[str, str]
) -> None:
    from hafrm.data.reader import read_preferences  # noqa: PLC0415
    from hafrm.data.splits import split_by_prompt, write_groups  # noqa: PLC0415
    from hafrm.preferences import num_comparisons  # noqa: PLC0415

    files = [out / "train.jsonl", out / "test.jsonl"]
    if there := [str(file) for file in files if file.exists()]:
        raise CheckpointError(f"{', '.join(there)} exists already: remove it or give another --out")
    if not 0.0 < fraction < 1.0:
        raise ConfigError(f"--split must be between 0 and 1, both excluded, got {fraction}")
    check_writable(files[0])
    bad = out / "bad_rows.jsonl"
    data = read_preferences(sources, bad_rows_file=bad, need_comparisons=False, columns=columns)
    if data.bad_rows:
        typer.echo(f"{len(data.bad_rows)} bad rows are left out: {bad}")
    parts = split_by_prompt(data.groups, fraction, seed)
    for file, part in zip(files, parts, strict=True):
        rows, pairs = write_groups(part, file), num_comparisons(part)
        unlabelled = f", {rows - pairs} rows of unlabelled responses" if rows > pairs else ""
        typer.echo(f"{file}: {pairs} comparisons of {len(part)} groups{unlabelled}")


@app.command("report")
def report_command(
    folders: Annotated[list[Path], Argument(help="Folders of runs, compare, best-of-n or rlhf.")],
    out: Annotated[Path, Option("--out", help="The HTML file.")] = Path("report.html"),
) -> None:
    """Write one self-contained page: summary, curves, accuracy with intervals, texts, provenance."""
    from hafrm.report.page import write_report  # noqa: PLC0415

    size = write_report(folders, out)
    typer.echo(f"{out}: {size / 1000:.0f} kB")


@app.command("demo")
def demo_command(
    out: Annotated[Path, Option(help="Folder for its data, runs and report.")] = Path("demo-run"),
) -> None:
    """Train HAF, BT and DPO on a made-up preference world and compare them, in a few minutes."""
    from hafrm.demo.run_demo import NEXT_STEPS, run_demo  # noqa: PLC0415
    from hafrm.report.terminal import print_tables  # noqa: PLC0415

    result = run_demo(out, on_stage=lambda text: typer.echo(text, err=True))
    print_tables([result.table()])
    page = result.report or "pip install 'hafrm[report]', then hafrm report on its folders"
    typer.echo(f"\nCurves, calibration and texts on one page: {page}\n{NEXT_STEPS}")
