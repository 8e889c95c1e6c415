"""The verbs that use a trained model: `evaluate`, `score`, `best-of-n`, `export`, `serve`, `verify`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from hafrm.bulk.shards import ROWS_PER_SHARD
from hafrm.cli.entry import Device, Dtype, HasTables, JsonFile, OptionalSources, app, show_result
from hafrm.errors import ConfigError, ModelError
from hafrm.progress import show_progress

if TYPE_CHECKING:
    from hafrm.export.checklist import Verification
    from hafrm.serving.server_checks import ServerReplay


@app.command("evaluate")
def evaluate_command(  # noqa: PLR0913 - the verb and its options
    model: Annotated[str, Argument(help="Run folder, model directory, or NAME=PATH.")],
    data: OptionalSources = None,
    *,
    also: Annotated[list[str] | None, Option(help="Another model, or a seed: NAME=PATH.")] = None,
    benchmark: Annotated[list[str] | None, Option(help="Such as rewardbench2, or all.")] = None,
    diagnose: Annotated[bool, Option("--diagnose", help="Also why it is right or wrong.")] = False,
    json_file: JsonFile = None,
    max_length: Annotated[int | None, Option(help="Cut to N tokens (default: the run's).")] = None,
    max_bad_fraction: Annotated[float, Option(help="Bad rows allowed.", min=0, max=1)] = 0.02,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Measure pairwise accuracy with 95 % intervals, calibration, length bias, and baselines.

    DATA: preferences, or for published benchmarks a local folder (else the hub). Evaluates one model, or
    compares several. For a run folder, the result is also saved in it for `hafrm report`: evaluation.json,
    diagnostics.json (--diagnose) or benchmarks.json. Under torchrun, the processes divide the scoring.
    """
    if benchmark and (also or diagnose or len(data or ()) > 1):
        raise ConfigError(
            "--benchmark allows no --also and no --diagnose, and at most one folder as DATA"
        )
    if not benchmark and not data:
        raise ConfigError("hafrm evaluate needs DATA, or --benchmark with a name")
    from hafrm.benchmarks.benchmark_run import run_benchmarks  # noqa: PLC0415
    from hafrm.diagnostics.model_runs import diagnose as diagnose_model  # noqa: PLC0415
    from hafrm.evaluation import compare_models, heads  # noqa: PLC0415
    from hafrm.evaluation import evaluate as evaluate_model  # noqa: PLC0415
    from hafrm.training import parallel  # noqa: PLC0415

    result: HasTables
    parallel.start()
    options = heads.EvaluationOptions(None, max_length, dtype, device, max_bad_fraction)
    sources = data or []
    (name, path), *others = map(_named, [model, *(also or ())])
    kind = "benchmarks" if benchmark else "diagnostics" if diagnose else "evaluation"
    is_run = (Path(path) / "recipe.yaml").is_file() and os.access(path, os.W_OK)
    own_file = Path(path) / f"{kind}.json" if is_run and (diagnose or not also) else None
    with parallel.progress_of_main("scoring responses") as progress:
        run: dict[str, Any] = {"options": options, "on_progress": progress}
        if benchmark:
            folder = Path(sources[0]) if sources else None
            result = run_benchmarks(path, benchmark, folder=folder, **run)
        elif diagnose:
            result = diagnose_model(path, sources, also=[other for _, other in others], **run)
        elif also:
            seeds = [path, *(p for other, p in others if other and other == name)]
            rivals = [p for other, p in others if not (other and other == name)]
            if len(names := sorted({other for other, _ in others} - {name or None})) > 1:
                raise ConfigError(
                    f"--also gives several rivals ({', '.join(n or 'without a name' for n in names)}): "
                    "compare MODEL with one at a time; several paths of one NAME are its seeds"
                )
            result = compare_models(seeds, rivals, sources, **run)
        else:
            result = evaluate_model(path, sources, **vars(options), on_progress=progress)
    parallel.stop()
    if parallel.is_main():
        show_result(result, json_file, own_file)


def _named(text: str) -> tuple[str, str]:
    """(NAME, PATH) of NAME=PATH; an existing path may contain "=" and has no name."""
    name, equals, path = text.partition("=")
    return (name, path) if equals and "/" not in name and not Path(text).exists() else ("", text)


@app.command("score")
def score_command(  # noqa: PLR0913 - the verb and its options
    model: Annotated[str, Argument(help="Run folder or model directory.")],
    sources: Annotated[list[str], Argument(help="Files, folders, hub sets (docs/scoring.md).")],
    *,
    out: Annotated[Path, Option(help="Folder for the rows with their scores.")],
    rows_per_shard: Annotated[int, Option(help="Rows per output file.", min=1)] = ROWS_PER_SHARD,
    shard: Annotated[str, Option(help="i/n: score only part i of n (0 to n - 1).")] = "0/1",
    dtype: Dtype = "auto",
    device: Device = None,
    max_length: Annotated[int | None, Option(help="In tokens; longer rows get no score.")] = None,
    by: Annotated[str, Option(help="reward, implicit or reward,implicit.")] = "reward",
    per_token: Annotated[bool, Option("--per-token", help="Also each token's part.")] = False,
) -> None:
    """Add the model's scores to every row, in the same order. The same command resumes a stopped job."""
    from hafrm.bulk.bulk_job import RECORDS, BulkOptions, score_files  # noqa: PLC0415
    from hafrm.scoring.outputs import TOKENS  # noqa: PLC0415

    outputs = tuple(dict.fromkeys([*by.split(","), *[TOKENS] * per_token]))
    options = BulkOptions(rows_per_shard, max_length, dtype, device, shard, outputs)
    with show_progress("scoring rows") as on_progress:
        result = score_files(model, sources, out, options, on_progress)
    typer.echo(
        f"scored {result.num_responses} responses in {result.num_rows} rows, "
        f"{result.num_bad} of the rows not scored (see their `error`): {out}"
    )
    if result.num_resumed:
        typer.echo(f"{result.num_resumed} shards were already finished")
    if result.num_bad:
        typer.echo(f"rows without a score are listed with reasons: {out / RECORDS}")


@app.command("best-of-n")
def best_of_n_command(  # noqa: PLR0913 - the verb and its options
    models: Annotated[list[str], Argument(help="Runs or model directories: PATH, NAME=PATH.")],
    *,
    prompts: Annotated[list[str], Option(help="Prompts (with responses if no --policy).")],
    out: Annotated[Path, Option(help="Folder for all results; resumes a killed job.")],
    policy: Annotated[str | None, Option(help="Samples candidates: directory or URL.")] = None,
    num: Annotated[int, Option("-n", "--num", help="Candidates for each prompt.")] = 16,
    gold: Annotated[str | None, Option(help="A gold score: demo, or a model.")] = None,
    judge: Annotated[str | None, Option(help="Compares picks: an LLM at a URL.")] = None,
    seed: Annotated[int, Option(help="Another seed gives other candidates.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    settings: Annotated[list[str] | None, Option("--set", help="section.key=value.")] = None,
) -> None:
    """Score the same candidates with every model and compare what each picks, for n = 1 to N.

    Shows curves with intervals, gold score over KL (with --gold), and wins between models.
    """
    from hafrm.best_of_n.run_best_of_n import BestOfNOptions, best_of_n  # noqa: PLC0415
    from hafrm.demo.gold import gold_reward  # noqa: PLC0415
    from hafrm.recipe_file import build_as  # noqa: PLC0415

    pick = {"models": models, "prompts": prompts, "policy": policy, "gold": gold, "judge": judge}
    pick |= {"dtype": dtype, "device": device}
    values = {"pick": pick, "draw": {"num": num, "seed": seed}}
    options = build_as(BestOfNOptions, values, "the options", overrides=settings or ())
    result = best_of_n(options, out, golds={"demo": gold_reward})
    show_result(result)
    typer.echo(f"every number is in {out / 'best_of_n.json'}, every pick in {out / 'picks.jsonl'}")


@app.command("export")
def export_command(
    run: Annotated[Path, Argument(help="A run folder, finished or not.")],
    *,
    out: Annotated[Path, Option(help="The directory to write; it must not exist.")],
    policy: Annotated[bool, Option("--policy", help="Export the policy instead.")] = False,
    dtype: Annotated[str | None, Option(help="Such as float16 (default: the run's).")] = None,
    merge_lora: Annotated[bool | None, Option(help="Merge LoRA, or write an adapter.")] = None,
    checkpoint: Annotated[str, Option(help="best, latest or a step.")] = "best",
) -> None:
    """Write one head of a run as a directory that stock transformers loads, and check its scores."""
    from hafrm.training.run_export import ExportOptions, export_from_run  # noqa: PLC0415

    options = ExportOptions("policy" if policy else "reward", dtype, merge_lora, checkpoint)
    done = export_from_run(run, out, options)
    lora = {None: "", True: ", LoRA merged", False: ", as an adapter"}[done.merged]
    typer.echo(f"exported the {options.head} model from {done.source} in {done.dtype}{lora}: {out}")
    what = "golden scores" if options.head == "reward" else "log-probs"
    same = f"plain transformers gives the same {done.num_golden} {what}"
    typer.echo(f"{same} (largest difference {done.difference:.2g})")


@app.command("serve")
def serve_command(  # noqa: PLR0913 - the verb and its options
    model: Annotated[str, Argument(help="Run folder, or the directory of one head.")],
    *,
    host: Annotated[str, Option(help="0.0.0.0 to serve other machines too.")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535)] = 8000,
    upstream: Annotated[str | None, Option(help="URL of vLLM or SGLang serving it.")] = None,
    api_key_file: Annotated[Path | None, Option(help="Bearer keys, one per line.")] = None,
    no_auth: Annotated[bool, Option("--no-auth", help="Other machines need no key.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    max_length: Annotated[int | None, Option(help="In tokens; longer inputs are refused.")] = None,
    upstream_key: Annotated[
        str | None, Option(envvar="HAFRM_API_KEY", help="--upstream's key.")
    ] = None,
) -> None:
    """Serve rewards to trainers: OpenRLHF, verl, slime, TRL, and clients of vLLM and SGLang.

    Ready once the model reproduces its golden scores. On SIGTERM, answers accepted requests and exits 0.
    """
    keys = [] if api_key_file is None else api_key_file.read_text(encoding="utf-8").split()
    if api_key_file is not None and not keys:
        raise ConfigError(f"{api_key_file} holds no key")
    if host not in ("127.0.0.1", "localhost", "::1") and not (keys or no_auth):
        raise ConfigError(f"--host {host} lets other machines in: give --api-key-file or --no-auth")
    try:
        from hafrm.serving import reward_app  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'hafrm[serve]'") from error
    reward_app.check_port(host, port)  # loading the model takes longer
    from hafrm.serving.backends import LocalBackend, UpstreamBackend  # noqa: PLC0415

    backend = (
        LocalBackend(model, dtype=dtype, device=device, max_length=max_length)
        if upstream is None
        else UpstreamBackend(model, upstream, upstream_key, max_length)
    )
    server = reward_app.RewardServer(backend, Path(model).name, keys)
    typer.echo(f"serving {', '.join(backend.names)} of {model} at http://{host}:{port}", err=True)
    reward_app.run_server(server, host, port)


@app.command("verify")
def verify_command(
    target: Annotated[str, Argument(help="Reward directory, run folder, or a server's URL.")],
    *,
    golden: Annotated[Path | None, Option(help="Golden file or export (default: own).")] = None,
    json_file: JsonFile = None,
    tolerance: Annotated[
        float | None,
        Option(help="Largest difference (default: 1e-4; a server: by the golden scores' spread)."),
    ] = None,
    api_key: Annotated[str | None, Option(help="Bearer token.", envvar="HAFRM_API_KEY")] = None,
) -> None:
    """Check an export clause by clause, or replay its golden scores on a server; exit code 1 on failure."""
    options: dict[str, Any] = {} if tolerance is None else {"tolerance": tolerance}
    result: Verification | ServerReplay
    from hafrm.scoring.loading import head_directory  # noqa: PLC0415

    if target.startswith(("http://", "https://")):
        from hafrm.serving.server_checks import verify_server  # noqa: PLC0415

        if golden is None:
            raise ConfigError("a server needs golden scores: give --golden, an exported directory")
        golden = Path(head_directory(golden, "reward"))
        result = verify_server(target, golden, api_key=api_key, **options)
    else:
        from hafrm.export.checklist import verify_directory  # noqa: PLC0415
        from hafrm.scoring.reward_model import IMPLICIT_RULE  # noqa: PLC0415

        directory = Path(head_directory(target, "reward"))
        policy = Path(head_directory(directory, "policy"))
        if policy != directory or (policy / IMPLICIT_RULE).is_file():
            proved = "a policy's log-probs are proved when it is exported"
            raise ModelError(f"{target} is a policy, but verify checks reward models: {proved}")
        result = verify_directory(directory, golden, **options)
    show_result(result, json_file)
    if not result.ok:
        raise typer.Exit(1)
