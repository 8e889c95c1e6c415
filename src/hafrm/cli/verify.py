"""The verb `verify`: checks that a reward directory or a running server gives every consumer its scores."""

from pathlib import Path
from typing import Annotated

import typer

from hafrm.cli.entry import JsonFile, app, show_result


@app.command()
def verify(  # noqa: PLR0913 - the verb and its options
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
    options: tuple[str | None, str | None, float | None],
) -> bool:
    from hafrm.export.reward_servers import (  # noqa: PLC0415
        SERVER_TOLERANCE,
        Address,
        verify_server,
    )

    protocol, api_key, timeout = options
    replay = verify_server(
        Address(url, api_key, timeout or 60.0),
        golden,
        protocol=protocol or "auto",
        tolerance=SERVER_TOLERANCE if tolerance is None else tolerance,
    )
    show_result(replay, json_file)
    return replay.ok


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
