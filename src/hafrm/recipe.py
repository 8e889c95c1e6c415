"""The schema of a training recipe: every key, with its type, bounds, default, unit and the paper's value.

The paper is HAF-RM (arXiv 2407.04185); its values are those of its released code. Error messages and
docs/recipes.md quote the line under each key (`describe_keys`). `hafrm.recipe_file` reads recipes.
"""

import json
import os
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    model_validator,
)


def _tuple_if_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _tuple_of_one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _tuple_if_list(value)


Text = Annotated[str, Field(min_length=1)]
Location = Annotated[Text, AfterValidator(os.path.expanduser)]
_ONE_OR_MANY = BeforeValidator(_tuple_of_one_or_many, json_schema_input_type=str | list[str])
Sources = Annotated[tuple[Location, ...], _ONE_OR_MANY]
Columns = Annotated[tuple[Text, ...], _ONE_OR_MANY]
Weight = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Weights = Annotated[tuple[Weight, ...], BeforeValidator(_tuple_if_list)]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class Section(BaseModel):
    """A group of keys: frozen; an unknown key or a value of another type is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class PolicySection(Section):
    """The language model to start from."""

    path: Location
    """A causal LM, reward model or adapter (directory, hub id), or a run (paper: Phi-2, Mistral-7B)."""
    revision: Text | None = None
    """Commit, tag or branch if `path` is a hub id; a commit makes the run reproducible."""
    chat_template: Location | None = None
    """A Jinja file, paper-phi-2 or paper-mistral; null: the model's own template, or a plain one."""
    policy_from: Location | None = None
    """Model to take the LM head from if `path` is a reward model without one: what it was trained from."""


class ModelSection(PolicySection):
    """The language model to start from, and its reward head."""

    reward_head: Literal["new", "keep"] | None = None
    """keep: continue with the reward head of `path`; new: start a new one; null: keep it if it exists."""
    quantization: Literal["nf4"] | None = None
    """nf4: with `lora`, hold the frozen linear layers in 4 bits (QLoRA; needs hafrm[qlora])."""


class DataSection(Section):
    """The preference data, and how long an example may be."""

    train: Sources = Field(min_length=1)
    """Sources to train on: `file`, `file#split=train&limit=1000`, `hub:name[:config]:split`, `set:name`."""
    cap: int | None = Field(default=None, ge=1)
    """Maximum comparisons taken from each set of `train`; null: all (paper: 10,000 when it mixes sets)."""
    weights: Weights | None = None
    """Weights of the losses, one for each entry of `train`; null: 1."""
    validation: Sources = ()
    """Sources to select the best checkpoint on; empty: hold out part of `train` by prompt."""
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Fraction of the prompts of `train` held out; 0 when `validation` names sources."""
    test: Sources = ()
    """Sources evaluated once, after training; nothing is selected on them."""
    max_length: int = Field(default=1024, ge=2)
    """Maximum tokens of a prompt plus one response (paper: 512)."""
    max_prompt_length: int | None = Field(default=None, ge=1)
    """Tokens that a prompt keeps at least if it must be cut; null: half of max_length (paper: 128)."""
    too_long: Literal["cut", "drop"] = "cut"
    """What happens to longer examples; they are counted (paper: cut)."""
    shared_prompts: Literal["refuse", "drop"] = "refuse"
    """Training prompts that are also in `validation` or `test`: an error, or left out and counted."""
    max_bad_fraction: float = Field(default=0.02, ge=0, le=1)
    """Fraction of unusable rows above which the run stops."""
    columns: dict[Text, Text] = {}
    """The data's column names, where they differ: `{prompt: question, chosen: good, rejected: bad}`."""
    ignore_columns: Columns = ()
    """Columns to ignore; any other column that belongs to a prompt but is not read is an error."""
    implicit_prompt: Literal["lines", "words"] = "lines"
    """Where to cut two texts without a prompt: after the lines or the words that both start with."""

    @property
    def reading_options(self) -> dict[str, Any]:
        """The arguments of `read_preferences` that say how rows are read."""
        names = ("max_bad_fraction", "columns", "ignore_columns", "implicit_prompt")
        return {name: getattr(self, name) for name in names}

    @model_validator(mode="before")
    @classmethod
    def _hold_out_nothing_beside_a_validation_set(cls, values: Any) -> Any:
        named = isinstance(values, dict) and values.get("validation")
        return {"validation_fraction": 0.0, **values} if named else values

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "DataSection":
        room, fraction = self.max_prompt_length, self.validation_fraction
        num, weights = len(self.train), self.weights
        problems = []
        if room is not None and room >= self.max_length:
            problems = [f"data.max_prompt_length is {room}: it must be below data.max_length"]
        if self.validation and fraction:
            problems += ["data.validation and validation_fraction are both set: remove one of them"]
        if not self.validation and not fraction:
            problems += ["no data to select the best step by: set data.validation_fraction to 0.05"]
        if weights is not None and len(weights) != num:
            problems += [f"data.weights has {len(weights)} numbers for {num} entries of data.train"]
        problems += [
            f"data.{other} names {source!r}, and data.train too: remove it from one of them"
            for other in ("validation", "test")
            for source in getattr(self, other)
            if source in self.train
        ]
        if problems:  # in one error, one line each
            raise ValueError("\n".join(problems))
        return self


class MethodSection(Section):
    """The objective, reward_weight * reward loss + alpha * policy loss; null: the method's default."""

    name: Text = "bt"
    """Name of a method: bt, haf (the paper's), dpo, grm-sft, ..."""
    reward_weight: float | None = Field(default=None, ge=0)
    """Weight of the reward loss (paper: 1)."""
    alpha: float | None = Field(default=None, ge=0)
    """Weight of the policy loss (paper: 0.2)."""
    policy_loss: Text | None = None
    """Name of a policy loss: dpo (paper), ipo, simpo, orpo, kto, sft, ..."""
    beta: float | None = Field(default=None, gt=0)
    """Temperature of the policy loss, the paper's tau (paper: 0.1)."""
    gamma: float | None = Field(default=None, ge=0)
    """Target margin of SimPO, in its own reward units."""
    label_smoothing: float | None = Field(default=None, ge=0, lt=0.5)
    """Assumed fraction of flipped preferences (paper: 0)."""
    centering: float | None = Field(default=None, ge=0)
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards around zero (paper: 0)."""
    reward_loss: Text | None = None
    """Name of a reward loss: bt (paper), normbt."""
    sum_to_zero: float | None = Field(default=None, ge=0)
    """Weight of BSR's penalty: a step's number of comparisons times its squared mean reward (paper: 0)."""


class TrainingSection(Section):
    """The optimizer, its schedule and how a step runs on the hardware."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training comparisons."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; overrides epochs (paper: 3200)."""
    batch_size: int = Field(default=16, ge=1)
    """Comparisons per optimizer step, over all processes (paper: 16)."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """AdamW's peak learning rate (paper: 1e-5 for all weights, 3e-5 with LoRA)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate changes after the warm-up (paper: linear)."""
    warmup_fraction: float = Field(default=0.03, ge=0, le=1)
    """Fraction (not number) of the steps in which the learning rate rises from 0 (paper: 0)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay, on weight matrices only (paper: 0)."""
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(_tuple_if_list)] = (0.9, 0.999)
    """AdamW's betas (paper: 0.9, 0.999)."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's eps (paper: 1e-5)."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """The gradient is clipped to this 2-norm; 0: not clipped (paper: 1.0)."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the reward head, the held-out prompts and the data order (paper: 0)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, else fp32; bf16: autocast over fp32 weights (frozen: bf16; paper: fp16)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile each layer with torch.compile: a minute at the start, then faster steps."""
    max_tokens: PositiveInt | Literal["auto"] = 8192
    """Token budget of a micro-batch; auto: what fits in memory. It never changes the gradient."""
    comparisons_per_prompt: int = Field(default=4, ge=1)
    """Maximum comparisons of one prompt in one optimizer step."""
    sharing: Literal["auto", "off"] = "auto"
    """auto: run each prompt once for all its responses wherever the model allows it."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp", "ulysses"] = "auto"
    """ddp: copies; fsdp: shards (hsdp: per node; ulysses: sequences too); auto: fsdp, or ddp for LoRA."""
    offload: Literal["none", "activations", "weights", "all"] = "none"
    """What to keep on the host until needed: checkpointed activations, the shards (weights), or both."""

    @model_validator(mode="after")
    def _offloads_what_is_there(self) -> "TrainingSection":
        if self.offload in ("activations", "all") and not self.gradient_checkpointing:
            needed = "training.gradient_checkpointing, whose activations are moved: set it to true"
            raise ValueError(f"training.offload is {self.offload} and needs {needed}")
        return self

    @property
    def token_budget(self) -> int:
        """max_tokens as a number: a run replaces auto before it starts."""
        assert isinstance(self.max_tokens, int), "only a planned recipe has a token budget"
        return self.max_tokens


class LoraSection(Section):
    """Low-rank adapters; the reward head is always trained and saved; dropout is always 0."""

    rank: int = Field(default=64, ge=1)
    """Rank of each adapter (paper: 64)."""
    alpha: float = Field(default=16.0, gt=0)
    """Scale: the adapters' output is multiplied by alpha / rank (paper: 16)."""
    targets: Annotated[
        Text | Annotated[tuple[Text, ...], Field(min_length=1)], BeforeValidator(_tuple_if_list)
    ] = "all-linear"
    """Modules to adapt: all-linear (not 3-D experts), name endings or one regex (paper: the MLP's proj)."""


class EvaluationSection(Section):
    """How the best checkpoint is selected, on validation data only."""

    every: int = Field(default=250, ge=0)
    """Steps between evaluations; 0: only at the end (paper: 80)."""
    metric: Literal["accuracy", "loss"] = "accuracy"
    """Metric that selects the best checkpoint (paper: accuracy)."""


class CheckpointSection(Section):
    """Which checkpoints are saved and kept."""

    every: int = Field(default=500, ge=0)
    """Steps between checkpoints; 0: only on a signal and at the end (paper: 80)."""
    keep: int = Field(default=2, ge=1)
    """Number of newest checkpoints kept; the best one is kept too (paper: 2)."""


class TrackingSection(Section):
    """Where metrics are logged besides metrics.jsonl, which is always written."""

    report_to: Annotated[tuple[Tracker, ...], BeforeValidator(_tuple_of_one_or_many)] = ()
    """Trackers; each needs its package installed."""
    project: Text = "hafrm"
    """Project name for the trackers."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two lines of metrics.jsonl."""


class Recipe(Section):
    """Everything that decides what a training run computes, and how it is tracked."""

    model: ModelSection
    data: DataSection
    method: MethodSection = MethodSection()
    training: TrainingSection = TrainingSection()
    lora: LoraSection | None = None
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _quantises_what_is_frozen_and_whole(self) -> "Recipe":
        sharded = self.training.parallel in ("fsdp", "hsdp", "ulysses")
        if self.model.quantization and (self.lora is None or sharded):
            raise ValueError(
                "model.quantization needs `lora`, and training.parallel auto or ddp: quantised weights "
                "can be neither trained nor sharded"
            )
        return self

    @model_validator(mode="after")
    def _fits_a_comparison_into_a_micro_batch(self) -> "Recipe":
        budget, longest = self.training.max_tokens, 2 * self.data.max_length
        if budget == "auto" or budget >= longest:
            return self
        raise ValueError(
            f"training.max_tokens is {budget}, and a comparison may take 2 x data.max_length = "
            f"{longest} tokens: raise it to {longest}, or lower data.max_length to {budget // 2}"
        )


class Key(NamedTuple):
    """One key of a recipe, in words."""

    name: str  # dotted, such as training.batch_size
    allowed: str
    default: str  # as written in a recipe; "required" when there is none
    meaning: str


@cache
def describe_keys(root: type[Section] = Recipe) -> dict[str, Key]:
    """Every key that a recipe may hold, by its name, in the order of the schema."""
    keys = {}
    for section, kind in sections_of(root).items():
        for leaf, info in kind.model_json_schema()["properties"].items():
            default = json.dumps(info["default"]) if "default" in info else "required"
            name = f"{section}.{leaf}"
            keys[name] = Key(name, _allowed(info), default, info.get("description", ""))
    return keys


def sections_of(root: type[Section]) -> dict[str, type[Section]]:
    """The sections of a recipe by name, optional ones included."""
    kinds = {}
    for name, info in root.model_fields.items():
        options = (info.annotation, *get_args(info.annotation))
        kinds[name] = next(k for k in options if isinstance(k, type) and issubclass(k, Section))
    return kinds


_TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "null": "null",
    "object": "keys and values",
}
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def _allowed(schema: Mapping[str, Any]) -> str:
    """What a JSON schema allows, such as "whole number >= 1 or null"."""
    if "anyOf" in schema:
        return " or ".join(map(_allowed, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " or ".join(schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        items = schema.get("prefixItems", [])
        size = f"{len(items)} x " if items else ""
        return f"list of {size}{_allowed(items[0] if items else schema['items'])}"
    bounds = [f"{sign} {schema[name]}" for name, sign in _BOUNDS.items() if name in schema]
    return " ".join([_TYPES[schema.get("type", "object")], " and ".join(bounds)]).rstrip()
