"""The verb `best-of-n`: reward models pick among the same candidates."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hafrm.cli.entry import Device, Dtype, app
from hafrm.terminal import show_count, show_tables


def _text(help_text: str) -> Any:
    return typer.Option(help=help_text)


Models = Annotated[
    list[str],
    typer.Argument(help="Run folders, reward or policy directories; name=path to call one so."),
]
Num = Annotated[int, typer.Option("-n", "--num", help="Candidates for each prompt.")]
Out = Annotated[Path, _text("The folder for all results; a killed job goes on.")]
Prompts = Annotated[list[str] | None, _text("Rows with prompts (for a policy); may be repeated.")]
Policy = Annotated[str | None, _text("Write candidates with this causal LM (directory).")]
Url = Annotated[str | None, _text("Or with this OpenAI-compatible endpoint (http://.../v1).")]
Files = Annotated[list[str] | None, _text("Or read them: rows with prompt and responses.")]
Tries = Annotated[int | None, _text("Draws for each prompt at most (default: twice -n).")]
Repeats = Annotated[bool, typer.Option("--repeats", help="Keep repeated draws.")]
Temperature = Annotated[float, _text("Of the policy; 1 as it is.")]
TopP = Annotated[float, _text("Of the policy; 1 keeps every token.")]
Tokens = Annotated[int, _text("Of a candidate, at most.")]
Seed = Annotated[int, _text("Another seed, other candidates.")]
Batch = Annotated[int, _text("Candidates that --policy writes at a time.")]
Template = Annotated[str | None, _text("A file with a Jinja template, for a --policy without one.")]
Name = Annotated[str | None, _text("Its model (default: the only one it lists).")]
Request = Annotated[list[str] | None, _text("name=value added to its requests; null leaves out.")]
Gold = Annotated[str | None, _text("A gold score for every candidate: demo, or a model.")]
Judge = Annotated[str | None, _text("Compares picks: http://.../v1, or a reward model.")]
Question = Annotated[Path | None, _text("What it is asked, with {prompt}, {first}, {second}.")]
Rank = Annotated[bool, typer.Option("--rank", help="Also let the judge rank all candidates.")]
Sample = Annotated[bool, typer.Option("--sample", help="Also judge picks against one sample.")]
Concurrency = Annotated[int, _text("Requests to an endpoint at a time.")]
Timeout = Annotated[float, _text("Seconds for one request.")]
Retries = Annotated[int, _text("Of a request that failed.")]
Length = Annotated[int | None, _text("Tokens of prompt and candidate (default: the model's).")]


@app.command(name="best-of-n")
def best_of_n(  # noqa: PLR0913 - the verb and its options
    models: Models,
    *,
    out: Out,
    num: Num = 16,
    prompts: Prompts = None,
    policy: Policy = None,
    endpoint: Url = None,
    candidates: Files = None,
    tries: Tries = None,
    repeats: Repeats = False,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    max_new_tokens: Tokens = 256,
    seed: Seed = 0,
    batch_size: Batch = 32,
    chat_template: Template = None,
    endpoint_model: Name = None,
    request: Request = None,
    gold: Gold = None,
    judge: Judge = None,
    judge_model: Name = None,
    judge_template: Question = None,
    judge_request: Request = None,
    rank: Rank = False,
    sample: Sample = False,
    concurrency: Concurrency = 8,
    timeout: Timeout = 120.0,
    retries: Retries = 6,
    max_length: Length = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Score candidates once with every model, and judge what each picks, for n = 1 to N.

    Curves with intervals, gold score over KL where a gold score is known, wins between models.
    """
    typed = dict(locals())
    from hafrm.alignment.verb import request_of, run_best_of_n  # noqa: PLC0415
    from hafrm.demo.gold import gold_reward  # noqa: PLC0415
    from hafrm.tables.best_of_n import best_of_n_tables  # noqa: PLC0415

    result = run_best_of_n(request_of(typed), {"demo": gold_reward}, show_count)
    show_tables(best_of_n_tables(result))
    typer.echo(f"every number is in {out / 'best_of_n.json'}, every pick in {out / 'picks.jsonl'}")
