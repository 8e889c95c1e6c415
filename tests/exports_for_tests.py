"""Tiny exported models on disk, as `hafrm train` leaves them, and conversations to score with them."""

from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hafrm.data.encoding import Encoder
from hafrm.data.groups import Comparison, Group, Message
from hafrm.engine.model import HybridModel, hidden_size, new_reward_head, split_causal_lm
from hafrm.scoring.export import export_policy, export_reward, gather_weights
from hafrm.scoring.scorer import ImplicitRule, write_implicit_rule
from models_for_tests import FAMILIES
from tokenizers_for_tests import chat_tokenizer

POSITIONS = 256


def causal_lm(
    family: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes: object
) -> PreTrainedModel:
    """A random causal LM of the family that has the tokenizer's vocabulary."""
    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(
        **{
            **sizes,
            "vocab_size": len(tokenizer),
            "n_positions" if name == "GPT2" else "max_position_embeddings": POSITIONS,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **changes,
        }
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    # Sharper than the usual 0.02: differences must show.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)
    return model.eval()


def hybrid(causal: PreTrainedModel, seed: int = 0, *, policy: bool = True) -> HybridModel:
    """The causal LM with both heads, or with a reward head only."""
    backbone, head = split_causal_lm(causal)
    generator = torch.Generator().manual_seed(seed)
    return HybridModel(
        backbone,
        reward_head=new_reward_head(hidden_size(backbone.config), generator),
        policy_head=head if policy else None,
    ).eval()


def export_model(
    directory: Path, family: str = "llama", seed: int = 0, rule: ImplicitRule | None = None
) -> tuple[HybridModel, Encoder]:
    """A model and its encoder, exported to `directory`/reward and `directory`/policy."""
    encoder = Encoder(chat_tokenizer(), max_length=POSITIONS)
    model = hybrid(causal_lm(family, encoder.tokenizer, seed), seed)
    weights = gather_weights(model)
    export_reward(weights, encoder, directory / "reward")
    export_policy(weights, encoder, directory / "policy")
    if rule is not None:
        write_implicit_rule(directory / "policy", rule)
    return model, encoder


PROMPTS = (
    "How do I bake bread?",
    "Tell me a story about the sea and a little boat, please.",
    "What is 40 + 2?",
    "Thank you!",
)
RESPONSES = (
    ("Mix flour, water, salt and yeast, then wait.", "No."),
    (
        "Once upon a time there was a little boat. It is a good idea to ask again.",
        "I think so",
        "a",
    ),
    ("42", "43, I think that it is 43."),
    ("You are welcome :-)",),
)


def groups(source: str = "pairs") -> list[Group]:
    """Four prompts with one to three responses, each compared with the one before it."""
    return [
        Group(
            id=f"{source}-{i}",
            prompt=(Message("user", prompt),),
            responses=responses,
            comparisons=tuple(Comparison(k, k - 1) for k in range(1, len(responses))),
            source=source,
        )
        for i, (prompt, responses) in enumerate(zip(PROMPTS, RESPONSES, strict=True))
    ]


def conversations(some: list[Group] | None = None) -> list[list[dict[str, str]]]:
    """Every prompt with each of its responses, as a consumer has them, in the order of the scores."""
    return [
        [*({"role": m.role, "content": m.content} for m in group.prompt), _answer(response)]
        for group in (groups() if some is None else some)
        for response in group.responses
    ]


def _answer(response: str) -> dict[str, str]:
    return {"role": "assistant", "content": response}


@torch.no_grad()
def stock_scores(
    directory: Path, messages: list[list[dict[str, str]]], side: str | None = None
) -> torch.Tensor:
    """What plain transformers gives: one conversation at a time, or all padded on one side."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32
    ).eval()
    texts = [tokenizer.apply_chat_template(m, tokenize=False) for m in messages]
    batches = [[text] for text in texts] if side is None else [texts]
    scores = []
    for batch in batches:
        inputs = tokenizer(
            batch,
            return_tensors="pt",
            padding=True,
            padding_side=side or "right",
            add_special_tokens=False,
        )
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        scores.append(
            model(
                input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions
            ).logits[:, 0]
        )
    return torch.cat(scores)
