"""The options of `hafrm best-of-n`, and how they become candidates, scorers and a judge."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from pydantic import Field

from hafrm.best_of_n.candidate_scores import (
    CandidateScorer,
    GoldReward,
    GoldScorer,
    ModelScorer,
    named_models,
)
from hafrm.best_of_n.candidates import DrawSection, Gather, from_files, from_policy, read_prompts
from hafrm.best_of_n.endpoint import Endpoint, EndpointSection, is_url
from hafrm.best_of_n.judges import JudgeSection, load_judge
from hafrm.best_of_n.picks import BestOfN
from hafrm.best_of_n.policies import EndpointPolicy, LocalPolicy
from hafrm.best_of_n.run_best_of_n import ShowProgress, best_of_n
from hafrm.engine.sampling import Sampling
from hafrm.errors import ConfigError
from hafrm.progress import no_progress
from hafrm.recipe import Section, Sources, Text
from hafrm.scoring.loading import Placement


class PickSection(Section):
    """Which models pick from what, and what compares the picks."""

    models: Sources = Field(min_length=1)
    """Run folders, reward or policy directories: PATH or NAME=PATH."""
    prompts: Sources = Field(min_length=1)
    """Rows with prompts for the policy; without a policy their responses are the candidates."""
    policy: Text | None = None
    """Writes the candidates: the directory of a causal LM, or the URL of an OpenAI-compatible endpoint."""
    gold: Text | None = None
    """A gold score for every candidate: demo, or a model."""
    judge: Text | None = None
    """Compares picks: an LLM at the URL of an endpoint."""
    sample: bool = False
    """Also compare every model's pick with the first candidate; a single model's always is."""
    dtype: Text = "auto"
    """float32, bfloat16 or float16; auto: the checkpoint's on a GPU, float32 on a CPU."""
    device: Text | None = None
    """cpu, cuda or cuda:1; null: a GPU where there is one."""


class BestOfNOptions(Section):
    """Everything that a best-of-n job depends on."""

    pick: PickSection
    draw: DrawSection = DrawSection()
    policy: EndpointSection = EndpointSection()
    judge: JudgeSection = JudgeSection()


def run_best_of_n(
    options: BestOfNOptions,
    out: Path,
    *,
    golds: Mapping[str, GoldReward] | None = None,
    show_progress: ShowProgress = lambda _: nullcontext(no_progress),
) -> BestOfN:
    """Run the job; `golds` are the gold rewards that have a name.

    Raises ConfigError for options that would have no effect, and what models, policies and judges raise.
    """
    pick, draw = options.pick, options.draw
    for name, target in (("policy", pick.policy), ("judge", pick.judge)):
        default = BestOfNOptions.model_fields[name].default
        if getattr(options, name) != default and not is_url(target):
            raise ConfigError(f"settings of `{name}` need --{name} URL, got {target}")
    place = Placement(pick.dtype, pick.device)
    models = [ModelScorer(path, name, place) for name, path in named_models(pick.models)]
    gold: CandidateScorer | None = None
    if pick.gold is not None and pick.gold in (golds or {}):
        gold = GoldScorer(pick.gold, (golds or {})[pick.gold])
    elif pick.gold is not None:
        gold = ModelScorer(pick.gold, f"gold ({pick.gold})", place)
    judge = None if pick.judge is None else load_judge(pick.judge, options.judge)
    return best_of_n(
        _gather(options, place),
        models,
        out,
        num=None if pick.policy is None else draw.num,
        gold=gold,
        judge=judge,
        sample=pick.sample,
        show_progress=show_progress,
    )


def _gather(options: BestOfNOptions, place: Placement) -> Gather:
    pick, draw = options.pick, options.draw
    if pick.policy is None:
        return from_files(pick.prompts, draw.num)
    sampling = Sampling(draw.max_new_tokens, draw.temperature, draw.top_p)
    prompts = read_prompts(pick.prompts)
    if is_url(pick.policy):
        policy = EndpointPolicy(Endpoint(pick.policy, options.policy), sampling)
        return from_policy(policy, prompts, draw)
    local = LocalPolicy(pick.policy, sampling, place=place, batch_size=draw.batch_size)
    return from_policy(local, prompts, draw)
