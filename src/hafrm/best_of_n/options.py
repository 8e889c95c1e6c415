"""The options of `hafrm best-of-n`, and how they become candidates, scorers and judges.

Combinations in which an option would do nothing are refused before anything is loaded.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pydantic import Field

from hafrm.best_of_n.candidate_scores import (
    CandidateScorer,
    GoldReward,
    GoldScorer,
    ModelScorer,
    short_names,
)
from hafrm.best_of_n.candidates import check_num_candidates, read_prompts
from hafrm.best_of_n.drawing import Drawing, Gather, from_files, from_policy
from hafrm.best_of_n.endpoint import Endpoint, EndpointOptions
from hafrm.best_of_n.judge_prompts import PAIRWISE, read_judge_template
from hafrm.best_of_n.judges import EndpointJudge, PairJudge, RankingJudge, ScoreJudge
from hafrm.best_of_n.picks import BestOfN
from hafrm.best_of_n.policies import EndpointPolicy, LocalPolicy
from hafrm.best_of_n.run_best_of_n import (
    Comparing,
    ShowProgress,
    best_of_n,
)
from hafrm.engine.sampling import Sampling
from hafrm.errors import ConfigError
from hafrm.progress import no_progress
from hafrm.recipe import Location, Section, Sources, Text
from hafrm.scoring.loading import AUTO, Placement


class DrawSection(Section):
    """How a policy writes candidates."""

    temperature: float = Field(default=1.0, ge=0)
    """Divides the logits; 1: the policy as it is."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of a candidate at most."""
    max_draws: int | None = Field(default=None, ge=1)
    """Draws for each prompt at most; null: twice as many as candidates."""
    repeats: bool = False
    """Keep repeated draws, so that candidates are independent samples of the policy."""
    batch_size: int = Field(default=32, ge=1)
    """Candidates that a policy on this machine writes at a time."""
    chat_template: Location | None = None
    """A file with a Jinja template, for a policy without one."""


class EndpointSection(Section):
    """A model behind an endpoint."""

    model: Text | None = None
    """Its name there; null: the only one that the endpoint lists."""
    request: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies it
    """Settings added to every request; null removes one."""


class JudgeSection(EndpointSection):
    """An LLM judge."""

    template: Location | None = None
    """A file with {prompt}, {first} and {second} that asks for a last line `Verdict: A`, B or tie."""
    rank: bool = False
    """Also let it rank all candidates of a prompt."""


class RequestSection(Section):
    """How endpoints are used."""

    concurrency: int = Field(default=8, ge=1)
    """Requests at a time."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds for one request."""
    retries: int = Field(default=6, ge=0)
    """Repetitions of a request that failed."""


class PickSection(Section):
    """Who is asked what."""

    models: Sources = Field(min_length=1)
    """Run folders, reward or policy directories; name=path to name one."""
    prompts: Sources = ()
    """Rows with prompts, for a policy."""
    policy: Text | None = None
    """Writes the candidates: the directory of a causal LM, or the URL of an OpenAI-compatible endpoint."""
    candidates: Sources = ()
    """Or rows with a prompt and responses to pick from."""
    num: int = 16
    """Candidates for each prompt."""
    gold: Text | None = None
    """A gold score for every candidate: demo, or a model."""
    judge: Text | None = None
    """Compares picks: the URL of an endpoint, or a reward model."""
    sample: bool = False
    """Also compare picks with one sample."""
    seed: int = Field(default=0, ge=0)
    """Another seed gives other candidates."""
    max_length: int | None = Field(default=None, ge=2)
    """Most tokens of prompt and candidate; null: what the reward model takes."""


class JudgeOptions(Section):
    """How a judge is asked."""

    judge: JudgeSection = JudgeSection()
    endpoint: RequestSection = RequestSection()


class BestOfNOptions(JudgeOptions):
    """Everything that a best-of-n job depends on."""

    pick: PickSection
    draw: DrawSection = DrawSection()
    policy: EndpointSection = EndpointSection()


def run_best_of_n(
    options: BestOfNOptions,
    out: Path,
    *,
    place: Placement = AUTO,
    golds: Mapping[str, GoldReward] | None = None,
    show_progress: ShowProgress = lambda _: nullcontext(no_progress),
) -> BestOfN:
    """Run the job; `golds` are the gold rewards known by name.

    Raises ConfigError for options that do not go together, and what the parts raise.
    """
    _check(options)
    pick = options.pick
    models = [
        ModelScorer(path, name, max_length=pick.max_length, place=place)
        for name, path in short_names(pick.models).items()
    ]
    comparing = _comparing(options, place, golds or {})
    return best_of_n(
        _gather(options, place),
        models,
        out,
        num=None if pick.candidates else pick.num,
        comparing=comparing,
        show_progress=show_progress,
    )


def _check(options: BestOfNOptions) -> None:
    pick, defaults = options.pick, BestOfNOptions.model_fields
    if bool(pick.policy) == bool(pick.candidates):
        raise ConfigError(
            "candidates come from one place: --policy (with --prompts), or --candidates FILE"
        )
    if bool(pick.prompts) == bool(pick.candidates):
        raise ConfigError(
            "--prompts says what a policy is asked: give it with --policy, and leave it out with "
            "--candidates, whose rows have their own"
        )
    check_num_candidates(pick.num)
    needs = {"policy": "--policy URL", "judge": "--judge URL"}
    for name, need in needs.items():
        target = getattr(pick, name)
        if getattr(options, name) != defaults[name].default and not _is_url(target):
            raise ConfigError(f"settings of `{name}` need {need}, got {target}")
    if options.draw.chat_template and _is_url(pick.policy):
        raise ConfigError(
            "draw.chat_template belongs to a policy on this machine, not to an endpoint"
        )


def _gather(options: BestOfNOptions, place: Placement) -> Gather:
    pick, draw = options.pick, options.draw
    if pick.candidates:
        return from_files(pick.candidates, pick.num)
    assert pick.policy is not None
    drawing = Drawing(pick.num, draw.max_draws, draw.repeats, pick.seed)
    sampling = Sampling(draw.max_new_tokens, draw.temperature, draw.top_p)
    prompts = read_prompts(pick.prompts)
    if _is_url(pick.policy):
        endpoint = _endpoint(pick.policy, options.policy, options.endpoint, "HAFRM_ENDPOINT_KEY")
        return from_policy(EndpointPolicy(endpoint, sampling), prompts, drawing)
    policy = LocalPolicy.from_pretrained(
        pick.policy,
        sampling,
        chat_template=draw.chat_template,
        place=place,
        batch_size=draw.batch_size,
    )
    return from_policy(policy, prompts, drawing)


def _comparing(
    options: BestOfNOptions, place: Placement, golds: Mapping[str, GoldReward]
) -> Comparing:
    pick = options.pick
    gold: CandidateScorer | None = None
    if pick.gold is not None and pick.gold in golds:
        gold = GoldScorer(pick.gold, golds[pick.gold])
    elif pick.gold is not None:
        name = f"gold ({pick.gold})"
        gold = ModelScorer(pick.gold, name, max_length=pick.max_length, place=place)
    judge, ranking = None, None
    if pick.judge is not None:
        judge = load_judge(pick.judge, options.judge, options.endpoint, pick.max_length, place)
        if options.judge.rank and isinstance(judge, EndpointJudge):
            ranking = RankingJudge(judge.endpoint, seed=pick.seed)
    return Comparing(gold, judge, ranking, pick.sample)


def load_judge(
    judge: str,
    section: JudgeSection,
    requests: RequestSection,
    max_length: int | None = None,
    place: Placement = AUTO,
) -> PairJudge:
    """The judge at a URL, or the reward model at a path as a judge."""
    if not _is_url(judge):
        return ScoreJudge(ModelScorer(judge, max_length=max_length, place=place))
    template = PAIRWISE if section.template is None else read_judge_template(section.template)
    return EndpointJudge(_endpoint(judge, section, requests, "HAFRM_JUDGE_KEY"), template)


def _is_url(text: str | None) -> bool:
    return text is not None and text.startswith(("http://", "https://"))


def _endpoint(url: str, section: EndpointSection, requests: RequestSection, key: str) -> Endpoint:
    return Endpoint(
        EndpointOptions(
            url=url,
            model=section.model,
            request=section.request,
            concurrency=requests.concurrency,
            timeout=requests.timeout,
            retries=requests.retries,
            key_variables=(key, "OPENAI_API_KEY"),
        )
    )
