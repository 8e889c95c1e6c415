"""The verb `verify`: checks that a reward directory or a running server gives every consumer its scores."""

from pathlib import Path
from typing import Annotated

import typer

from hafrm.cli.entry import JsonFile, app, show_result


@app.command("verify")
def verify_command(
    target: Annotated[
        str, typer.Argument(help="Any reward directory, a run folder, or a server's URL.")
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
    api_key: Annotated[
        str | None,
        typer.Option(help="Of a server: sent as a bearer token.", envvar="HAFRM_API_KEY"),
    ] = None,
) -> None:
    """Check an export clause by clause, or replay its golden scores on a server; exit code 1 on failure."""
    if not target.startswith(("http://", "https://")):
        ok = _directory(target, golden, json_file, tolerance)
    else:
        from hafrm.errors import ConfigError  # noqa: PLC0415
        from hafrm.export.reward_servers import SERVER_TOLERANCE, verify_server  # noqa: PLC0415

        if golden is None:
            raise ConfigError(
                "a server is compared with golden scores: give --golden, the exported directory or its "
                "golden_scores.jsonl"
            )
        limit = SERVER_TOLERANCE if tolerance is None else tolerance
        replay = verify_server(target, golden, api_key=api_key, tolerance=limit)
        show_result(replay, json_file)
        ok = replay.ok
    if not ok:
        raise typer.Exit(1)


def _directory(
    path: str, golden: Path | None, json_file: Path | None, tolerance: float | None
) -> bool:
    from hafrm.export.checklist import verify_directory  # noqa: PLC0415
    from hafrm.export.plain_model import TOLERANCE  # noqa: PLC0415
    from hafrm.scoring.loading import head_directory  # noqa: PLC0415

    verification = verify_directory(
        Path(head_directory(path, "reward")),
        golden,
        tolerance=TOLERANCE if tolerance is None else tolerance,
    )
    show_result(verification, json_file)
    return verification.ok
