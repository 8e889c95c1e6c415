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
    from hafrm.data.describe import describe  # noqa: PLC0415
    from hafrm.data.readers import read  # noqa: PLC0415
    from hafrm.tables.data import data_tables  # noqa: PLC0415

    reading = read(sources, max_bad_fraction=1.0)
    encoder = None
    if model is not None:
        from transformers import AutoTokenizer  # noqa: PLC0415

        from hafrm.data.encoding import Encoder  # noqa: PLC0415

        encoder = Encoder(AutoTokenizer.from_pretrained(model), max_length=max_length)
    description = describe(reading, None if encoder is None else encoder.encode)
    show_tables(data_tables(description))
    write_json(json_file, description.to_dict())


@app.command()
def split(
    sources: Sources,
    *,
    to: Annotated[Path, typer.Option(help="The folder for train.jsonl and test.jsonl.")],
    fraction: Annotated[float, typer.Option(help="Of the prompts, for the test part.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Another seed, another split.")] = 0,
) -> None:
    """Split preference data by prompt, so that no prompt is on both sides."""
    from hafrm.data.mixing import split_by_prompt  # noqa: PLC0415
    from hafrm.data.readers import read  # noqa: PLC0415
    from hafrm.data.writing import write_groups  # noqa: PLC0415

    reading = read(sources, bad_rows_file=to / "bad_rows.jsonl")
    for name, part in zip(
        ("train", "test"), split_by_prompt(reading.groups, fraction, seed), strict=True
    ):
        rows = write_groups(part, to / f"{name}.jsonl")
        typer.echo(f"{to / name}.jsonl: {rows} comparisons of {len(part)} groups")
