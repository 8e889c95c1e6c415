"""The verb `verify`: whether a reward directory, or a running server, gives every consumer its scores."""

from pathlib import Path
from typing import Annotated

import typer

from hafrm.cli.entry import JsonFile, app
from hafrm.terminal import show_tables, write_json


@app.command()
def verify(  # noqa: PLR0913 - the verb and its options
    target: Annotated[
        str, typer.Argument(help="A reward directory (anybody's), a run folder, or a server's URL.")
    ],
    *,
    golden: Annotated[
        Path | None,
        typer.Option(help="Golden scores: the file, or the exported directory (default: its own)."),
    ] = None,
    json_file: JsonFile = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest difference relative to max(1, |reward|) (default: 1e-4; a server: 1.5e-2)."
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Of a server: vllm-classify, vllm-pooling, sglang-classify or openrlhf (default: auto)."
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Of a server: sent as a bearer token.", envvar="HAFRM_API_KEY"),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Of a server: seconds for one answer (default: 60).")
    ] = None,
) -> None:
    """Check an export clause by clause, or replay its golden scores on a server; exit code 1 on failure."""
    from hafrm.errors import ConfigError  # noqa: PLC0415

    if target.startswith(("http://", "https://")):
        if golden is None:
            raise ConfigError(
                "a server is compared with golden scores: give --golden, the exported directory or its "
                "golden_scores.jsonl"
            )
        ok = _server(target, golden, json_file, tolerance, (protocol, api_key, timeout))
    else:
        if protocol is not None or timeout is not None:
            raise ConfigError(
                "--protocol and --timeout are for a server; a directory needs neither"
            )
        ok = _directory(target, golden, json_file, tolerance)
    if not ok:
        raise typer.Exit(1)


def _server(
    url: str,
    golden: Path,
    json_file: Path | None,
    tolerance: float | None,
    spoken: tuple[str | None, str | None, float | None],
) -> bool:
    from hafrm.scoring.servers.http import Address  # noqa: PLC0415
    from hafrm.scoring.servers.replay import TOLERANCE, verify_server  # noqa: PLC0415
    from hafrm.tables.server import server_lines  # noqa: PLC0415

    protocol, api_key, timeout = spoken
    found = verify_server(
        Address(url, api_key, timeout or 60.0),
        golden,
        protocol=protocol or "auto",
        tolerance=TOLERANCE if tolerance is None else tolerance,
    )
    show_tables(server_lines(found))
    write_json(json_file, found.to_dict())
    return found.ok


def _directory(
    path: str, golden: Path | None, json_file: Path | None, tolerance: float | None
) -> bool:
    from hafrm.scoring.checklist.subject import TOLERANCE  # noqa: PLC0415
    from hafrm.scoring.checklist.table import verify_directory  # noqa: PLC0415
    from hafrm.tables.verification import checklist_tables  # noqa: PLC0415

    finished = Path(path) / "model" / "reward"
    found = verify_directory(
        finished if finished.is_dir() else Path(path),
        golden,
        tolerance=TOLERANCE if tolerance is None else tolerance,
    )
    show_tables(checklist_tables(found))
    write_json(json_file, found.to_dict())
    return found.ok
