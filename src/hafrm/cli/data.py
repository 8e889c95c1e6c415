"""The verbs `data` and `split`: what preferences hold, and parts of them that share no prompt."""

from pathlib import Path
from typing import Annotated

import typer

from hafrm.cli.entry import JsonFile, Sources, app
from hafrm.terminal import show_tables, write_json


@app.command()
def data(
    sources: Sources,
    *,
    json_file: JsonFile = None,
    model: Annotated[
        str | None, typer.Option(help="Also count tokens with this model's tokenizer.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Length policy for the token counts.")] = 1024,
) -> None:
    """What preference data holds, what is wrong with it, its lengths and its length bias."""
    from hafrm.data.describe import describe_data  # noqa: PLC0415
    from hafrm.data.reader import read_preferences  # noqa: PLC0415
    from hafrm.results import to_plain  # noqa: PLC0415
    from hafrm.tables.data import data_tables  # noqa: PLC0415

    preferences = read_preferences(sources, max_bad_fraction=1.0)
    encode = None
    if model is not None:
        from transformers import AutoTokenizer  # noqa: PLC0415

        from hafrm.data.encoding import Encoder  # noqa: PLC0415

        encode = Encoder(AutoTokenizer.from_pretrained(model), max_length=max_length).encode
    description = describe_data(preferences, encode)
    show_tables(data_tables(description))
    write_json(json_file, to_plain(description))


@app.command()
def split(
    sources: Sources,
    *,
    out: Annotated[Path, typer.Option(help="Folder for train.jsonl and test.jsonl.")],
    fraction: Annotated[
        float, typer.Option(help="Fraction of the prompts in the test part.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Another seed gives another split.")] = 0,
) -> None:
    """Split preference data by prompt, so that no prompt is on both sides."""
    from hafrm.data.reader import read_preferences  # noqa: PLC0415
    from hafrm.data.splits import split_by_prompt, write_groups  # noqa: PLC0415
    from hafrm.preferences import num_comparisons  # noqa: PLC0415

    bad_rows_file = out / "bad_rows.jsonl"
    preferences = read_preferences(sources, bad_rows_file=bad_rows_file, need_comparisons=False)
    if preferences.bad_rows:
        typer.echo(f"{len(preferences.bad_rows)} bad rows are left out: {bad_rows_file}")
    parts = split_by_prompt(preferences.groups, fraction, seed)
    for name, part in zip(("train", "test"), parts, strict=True):
        file = out / f"{name}.jsonl"
        rows = write_groups(part, file)
        pairs = num_comparisons(part)
        unlabelled = f", {rows - pairs} rows of unlabelled responses" if rows > pairs else ""
        typer.echo(f"{file}: {pairs} comparisons of {len(part)} groups{unlabelled}")
