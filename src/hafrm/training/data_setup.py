"""From a recipe to encoded groups: read, mixed, split by prompt, checked for leakage, tokenised.

Everything here happens before the first step. The test set is read only to prove that no prompt of it
is trained on. Start at `prepare_data`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from hafrm.data.chat_template import choose_pad, read_template
from hafrm.data.encoding import Encoder
from hafrm.data.reader import PreferenceData, parse_sources, read_preferences
from hafrm.data.splits import check_leakage, mix, split_by_prompt, without_prompts
from hafrm.errors import DataError, ModelError
from hafrm.preferences import Group, TokenizedGroup
from hafrm.recipe import DataSection, ModelSection, Recipe

NUM_GOLDEN = 16  # held-out conversations whose scores are exported
VALIDATION_SEED = 2**32
"""Beyond the seeds that a user can split with: cut by the same hash as a user's own test split, nothing
would be left to validate on."""


@dataclass(frozen=True)
class PreparedData:
    """Encoded groups, and how many rows became what."""

    encoder: Encoder
    train: list[TokenizedGroup]
    validation: list[TokenizedGroup]
    golden: list[Group]  # held-out conversations whose scores are exported for consumers to replay
    counts: dict[str, Any]


def prepare_data(recipe: Recipe, bad_rows_file: Path | None = None) -> PreparedData:
    """Read, split by prompt, check for leakage, and encode.

    Raises DataError for unusable data, for prompts shared between splits, and for an empty split.
    """
    encoder = build_encoder(recipe)
    splits = read_splits(recipe, bad_rows_file)
    train, report = encoder.encode(splits.train)
    validation, _ = encoder.encode(splits.validation)
    for name, groups in (("data.train", train), ("data.validation", validation)):
        if not any(not c.tie for group in groups for c in group.comparisons):
            raise DataError(
                f"{name} holds no comparison that is not a tie; add preference data to it"
            )
    counts = {
        "rows": splits.reading.num_rows,
        "bad_rows": len(splits.reading.bad_rows),
        "left_out": splits.reading.left_out,
        "groups_with_shared_prompts_dropped": splits.num_dropped,
        "train_groups": len(train),
        "validation_groups": len(validation),
        "train_comparisons": sum(len(group.comparisons) for group in train),
        "ties_not_trained_on": sum(c.tie for group in train for c in group.comparisons),
        "encoding": asdict(report),
    }
    return PreparedData(encoder, train, validation, list(splits.validation[:NUM_GOLDEN]), counts)


class Splits(NamedTuple):
    """Groups to train on and to validate on."""

    reading: PreferenceData
    train: Sequence[Group]
    validation: Sequence[Group]
    num_dropped: int  # groups left out because another split has their prompt


def read_splits(recipe: Recipe, bad_rows_file: Path | None = None) -> Splits:
    """Read and split by prompt; raises DataError for unusable data and for shared prompts."""
    data, seed = recipe.data, recipe.training.seed
    reading = read_preferences(
        data.train, max_bad_fraction=data.max_bad_fraction, bad_rows_file=bad_rows_file
    )
    train: Sequence[Group] = _mixed(reading, data, seed)
    validation: Sequence[Group]
    if data.validation:
        validation = read_preferences(
            data.validation, max_bad_fraction=data.max_bad_fraction
        ).groups
    else:
        train, validation = split_by_prompt(
            train, fraction=data.validation_fraction, seed=VALIDATION_SEED + seed
        )
    test: Sequence[Group] = ()
    if data.test:
        test = read_preferences(data.test, max_bad_fraction=data.max_bad_fraction).groups
    num_groups = len(train) + len(validation)
    if data.shared_prompts == "drop":
        validation = without_prompts(validation, test)
        train = without_prompts(train, [*validation, *test])
    check_leakage([*train, *validation], test, names=("data.train", "data.test"))
    check_leakage(train, validation, names=("data.train", "data.validation"))
    return Splits(reading, train, validation, num_groups - len(train) - len(validation))


def _mixed(reading: PreferenceData, data: DataSection, seed: int) -> list[Group]:
    """The training groups, capped and weighted set by set."""
    ends = list(itertools.accumulate(reading.num_groups))
    sets = [reading.groups[end - n : end] for end, n in zip(ends, reading.num_groups, strict=True)]
    weights: list[float] | None = None
    if data.weights is not None:
        # An entry may name several sets, which share its weight.
        weights = [
            weight
            for entry, weight in zip(data.train, data.weights, strict=True)
            for _ in parse_sources(entry)
        ]
    return mix(sets, weights=weights, cap=data.cap, seed=seed)


def build_encoder(recipe: Recipe) -> Encoder:
    """The encoder that the recipe trains with; raises as `load_tokenizer` does."""
    data = recipe.data
    return Encoder(
        load_tokenizer(recipe.model),
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
        too_long=data.too_long,
    )


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerFast:
    """The base model's tokenizer, with its section's template and a pad of its own.

    Raises ModelError when there is no fast tokenizer or no pad, ConfigError for an unknown template.
    """
    path, revision = model.path, model.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        spare = AutoConfig.from_pretrained(path, revision=revision).get_text_config().vocab_size
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load a tokenizer from model.path {path!r}: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"model.path {path!r} has a slow tokenizer ({type(tokenizer).__name__}); convert it to a "
            "tokenizer.json, which every current checkpoint ships"
        )
    if model.chat_template is not None:
        tokenizer.chat_template = read_template(model.chat_template)
    try:
        choose_pad(tokenizer)
    except ModelError:
        # Phi-2 has no token to spare for padding, but more embeddings than tokens: use one of those.
        if len(tokenizer) >= spare:
            raise
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer
