"""What `hafrm best-of-n` does: from what was typed to candidates, scorers and judges.

Combinations in which something would be ignored are refused before anything is loaded.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hafrm.alignment.best_of_n import Gather, best_of_n, from_files, from_policy
from hafrm.alignment.candidates import check_num, read_prompts
from hafrm.alignment.endpoint import Endpoint, EndpointOptions
from hafrm.alignment.generate import Drawing, Policy
from hafrm.alignment.judge import EndpointJudge, PairJudge, RankingJudge, ScoreJudge
from hafrm.alignment.judge_prompts import PAIRWISE, read_judge_template
from hafrm.alignment.judging import Judging, Watch
from hafrm.alignment.policies import EndpointPolicy, LocalPolicy
from hafrm.alignment.reply_cache import ReplyCache
from hafrm.alignment.results import BestOfN
from hafrm.alignment.scorers import Gold, GoldScorer, ModelScorer, Scorer, short_names
from hafrm.cache import cache_folder
from hafrm.engine.sampling import Sampling
from hafrm.errors import ConfigError
from hafrm.scoring.loading import Placement


@dataclass(frozen=True)
class Writing:
    """Who writes candidates, and how; one of policy, endpoint and candidates."""

    prompts: Sequence[str] = ()
    policy: str | None = None
    endpoint: str | None = None
    candidates: Sequence[str] = ()
    endpoint_model: str | None = None
    request: Sequence[str] = ()
    chat_template: str | None = None
    num: int = 16
    tries: int | None = None
    repeats: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    batch_size: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Asking:
    """Who judges, and how endpoints are used."""

    gold: str | None = None
    judge: str | None = None
    judge_model: str | None = None
    judge_template: Path | None = None
    judge_request: Sequence[str] = ()
    rank: bool = False
    sample: bool = False
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6


@dataclass(frozen=True)
class BestOfNRequest:
    """Everything that was typed."""

    models: Sequence[str]
    out: Path
    writing: Writing = field(default_factory=Writing)
    asking: Asking = field(default_factory=Asking)
    max_length: int | None = None
    dtype: str = "auto"
    device: str | None = None

    @property
    def place(self) -> Placement:
        """Where models run; raises ConfigError for a dtype or device that there is not."""
        return Placement(self.dtype, self.device)


def request_of(typed: Mapping[str, Any]) -> BestOfNRequest:
    """What was typed, by the names of the fields above; None where nothing was."""
    given = {name: value for name, value in typed.items() if value is not None}

    def part(kind: type[Writing] | type[Asking] | type[BestOfNRequest]) -> dict[str, Any]:
        return {f.name: given[f.name] for f in fields(kind) if f.name in given}

    return BestOfNRequest(
        **part(BestOfNRequest), writing=Writing(**part(Writing)), asking=Asking(**part(Asking))
    )


def run_best_of_n(
    request: BestOfNRequest, golds: Mapping[str, Gold] | None = None, watch: Watch | None = None
) -> BestOfN:
    """Run the job; `golds` are the gold rewards that --gold knows by name.

    Raises ConfigError for options that do not go together, and what the parts raise.
    """
    _check(request)
    golds = golds or {}
    models = [
        _model(path, name, request) for name, path in short_names(list(request.models)).items()
    ]
    judging = _judging(request, golds)
    return best_of_n(
        _gather(request),
        models,
        request.out,
        num=None if request.writing.candidates else request.writing.num,
        judging=judging,
        watch=watch,
    )


def _check(request: BestOfNRequest) -> None:
    writing, asking = request.writing, request.asking
    given = [
        writing.policy,
        writing.endpoint,
        *([writing.candidates] if writing.candidates else []),
    ]
    if sum(each is not None for each in given) != 1:
        raise ConfigError(
            "candidates come from one place: --policy DIR or --endpoint URL (with --prompts DATA), or "
            "--candidates FILE"
        )
    if bool(writing.prompts) == bool(writing.candidates):
        raise ConfigError(
            "--prompts says what a policy is asked: give it with --policy or --endpoint, and leave it out "
            "with --candidates, whose rows have their own"
        )
    if writing.endpoint is None and (writing.endpoint_model or writing.request):
        raise ConfigError("--endpoint-model and --request belong to --endpoint")
    if writing.policy is None and writing.chat_template:
        raise ConfigError("--chat-template belongs to --policy")
    asked = asking.judge is not None and _is_url(asking.judge)
    if not asked and (asking.judge_model or asking.judge_template or asking.judge_request):
        raise ConfigError("--judge-model, --judge-template and --judge-request need --judge URL")
    if not asked and asking.rank:
        raise ConfigError("--rank needs --judge URL: a model that is asked to rank all candidates")
    request.place  # noqa: B018 - checked before anything is loaded
    check_num(writing.num)


def _model(path: str, name: str, request: BestOfNRequest) -> ModelScorer:
    return ModelScorer(path, name, max_length=request.max_length, place=request.place)


def _gather(request: BestOfNRequest) -> Gather:
    writing = request.writing
    if writing.candidates:
        return from_files(writing.candidates, writing.num)
    drawing = Drawing(writing.num, writing.tries, writing.repeats, writing.seed)
    sampling = Sampling(writing.max_new_tokens, writing.temperature, writing.top_p)
    prompts = read_prompts(writing.prompts)
    policy: Policy
    if writing.policy is not None:
        policy = LocalPolicy.from_pretrained(
            writing.policy,
            sampling,
            chat_template=writing.chat_template,
            place=request.place,
            batch_size=writing.batch_size,
        )
    else:
        assert writing.endpoint is not None
        options = _endpoint_options(
            writing.endpoint, writing.endpoint_model, writing.request, request.asking, "ENDPOINT"
        )
        policy = EndpointPolicy(Endpoint(options, _cache()), sampling)
    return from_policy(policy, prompts, drawing)


def _judging(request: BestOfNRequest, golds: Mapping[str, Gold]) -> Judging:
    asking = request.asking
    gold: Scorer | None = None
    if asking.gold is not None:
        known = golds.get(asking.gold)
        gold = (
            _model(asking.gold, f"gold ({asking.gold})", request)
            if known is None
            else GoldScorer(asking.gold, known)
        )
    judge: PairJudge | None = None
    ranking = None
    if asking.judge is not None and _is_url(asking.judge):
        options = _endpoint_options(
            asking.judge, asking.judge_model, asking.judge_request, asking, "JUDGE"
        )
        endpoint = Endpoint(options, _cache())
        template = PAIRWISE
        if asking.judge_template is not None:
            names = ("prompt", "first", "second")
            template = read_judge_template(asking.judge_template, names)
        judge = EndpointJudge(endpoint, template)
        ranking = RankingJudge(endpoint, seed=request.writing.seed) if asking.rank else None
    elif asking.judge is not None:
        judge = ScoreJudge(_model(asking.judge, asking.judge, request))
    return Judging(gold, judge, ranking, asking.sample)


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _endpoint_options(
    url: str, model: str | None, settings: Sequence[str], asking: Asking, role: str
) -> EndpointOptions:
    return EndpointOptions(
        url=url,
        model=model,
        request=parse_settings(settings),
        concurrency=asking.concurrency,
        timeout=asking.timeout,
        retries=asking.retries,
        key_variables=(f"HAFRM_{role}_KEY", "OPENAI_API_KEY"),
    )


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """Settings written as name=value; the value is JSON where it is any, else text."""
    settings = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise ConfigError(
                f"a setting of a request is written as name=value, such as seed=1; got {each!r}"
            )
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


def _cache() -> ReplyCache:
    return ReplyCache(cache_folder("replies") / "replies.sqlite")
