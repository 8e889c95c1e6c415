"""What a finished policy answers to test prompts, and what each answer scores; kept in a file."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hafrm.alignment.rlhf.actor import decode
from hafrm.alignment.rlhf.job import sampling_of
from hafrm.alignment.rlhf.prompts import fit_prompts, read_prompts
from hafrm.alignment.rlhf.recipe import RlhfRecipe
from hafrm.alignment.rlhf.rewards import load_scorer, score_texts
from hafrm.atomic import atomic_write
from hafrm.best_of_n.candidate_scores import GoldReward
from hafrm.data.encoding import Encoder
from hafrm.engine.sampling import sample
from hafrm.preferences import Message
from hafrm.recipe import ModelSection
from hafrm.training.prepare import load_base, load_tokenizer

_TEST_SEED = 2**61
"""Apart from the seeds of training and of held-out prompts."""


@dataclass(frozen=True)
class Answers:
    """One answer to each test prompt that fits, in the order of the prompts."""

    prompts: list[list[list[str]]]
    """Each as its turns, [role, content]."""
    texts: list[str]
    scores: list[float]
    """GoldReward rewards, or the rewards of evaluation.judge; empty where there is neither."""

    def messages(self, number: int) -> tuple[Message, ...]:
        """The prompt of an answer."""
        return tuple(Message(*turn) for turn in self.prompts[number])


def answer(
    recipe: RlhfRecipe,
    policy: str,
    file: Path,
    *,
    test: Sequence[str],
    seed: int,
    gold: GoldReward | None,
) -> Answers:
    """The policy's answers, sampled as the recipe says; from `file` where they are there already."""
    if file.is_file():
        return Answers(**json.loads(file.read_text(encoding="utf-8")))
    model = recipe.model
    if policy != model.path:  # an exported policy brings its template along
        model = ModelSection(path=policy)
    encoder = Encoder(load_tokenizer(model), max_length=2**20)
    prompts = fit_prompts(read_prompts(test, recipe.data), encoder, recipe.data)
    causal = load_base(model, torch.float32)
    causal.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    drawn = sample(
        causal,
        [prompt.ids.tolist() for prompt in prompts],
        1,
        sampling_of(recipe),
        eos=encoder.eos_id,
        pad=encoder.pad_id,
        seed=_TEST_SEED + seed,
        batch_size=recipe.sampling.batch_size,
    )
    texts = [decode(encoder, ids) for (ids,) in drawn]
    asked = [prompt.messages for prompt in prompts]
    scores: list[float] = []
    if gold is not None:
        scores = [float(gold(*each)) for each in zip(asked, texts, strict=True)]
    elif recipe.evaluation.judge is not None:
        judge = load_scorer(recipe.evaluation.judge)
        scores = score_texts(judge, asked, [[text] for text in texts]).tolist()
    turns = [[list(message) for message in messages] for messages in asked]
    found = Answers(turns, texts, scores)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n")
    return found
