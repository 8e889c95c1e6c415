"""Replay a reward directory's golden scores with plain transformers, in a process of its own.

Run as a script (`python golden_check.py DIR`), it imports nothing of hafrm, so that what it confirms is
what any consumer gets: ids from the exported template, one at a time, and in batches padded on either
side. Prints one JSON line; exits 1 on disagreement.
"""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

BATCH = 16


def room_for(num_weights: int) -> int:
    """Bytes that a GPU must have free for float32 weights and what a batch takes beside them."""
    return int(1.3 * 4 * num_weights) + 2**31


def replay(directory: Path) -> dict[str, Any]:
    """Largest differences to the golden scores, and what else is wrong with the directory."""
    lines = (directory / "golden_scores.jsonl").read_text(encoding="utf-8").splitlines()
    golden = [json.loads(line) for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if (directory / "adapter_config.json").is_file():
        model, faults = _with_adapter(directory, tokenizer), []
    else:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
        faults = [f"freshly initialised: {name}" for name in loading["missing_keys"]]
        faults += _wrong_settings(model.config, tokenizer)
    model.eval().to(_device_for(model))
    texts = [str(tokenizer.apply_chat_template(g["messages"], tokenize=False)) for g in golden]
    for text, row in zip(texts, golden, strict=True):
        for special in (True, False):
            ids = tokenizer(text, add_special_tokens=special)["input_ids"]
            if ids != row["input_ids"]:
                faults.append(f"ids differ (add_special_tokens={special}) for {text[-40:]!r}")
    expected = torch.tensor([g["reward"] for g in golden])
    differences = {}
    if not faults:
        scores = {"alone": torch.cat([_scores(model, tokenizer, [t], "right") for t in texts])}
        for side in ("right", "left"):
            batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
            scores[side] = torch.cat([_scores(model, tokenizer, b, side) for b in batches])
        differences = {
            name: float(((s - expected).abs() / expected.abs().clamp(min=1.0)).max())
            for name, s in scores.items()
        }
    return {"differences": differences, "faults": faults, "num_golden": len(golden)}


def _device_for(model: Any) -> torch.device:
    """The GPU where the model fits into its free memory, else the CPU."""
    needed = room_for(sum(p.numel() for p in model.parameters()))
    fits = torch.cuda.is_available() and needed <= torch.cuda.mem_get_info()[0]
    return torch.device("cuda" if fits else "cpu")


def _with_adapter(directory: Path, tokenizer: Any) -> Any:
    """The base checkpoint under the adapter, told what an adapter cannot tell: one label, and the pad."""
    from peft import PeftConfig, PeftModel  # noqa: PLC0415 - heavy, and only for adapters

    known = PeftConfig.from_pretrained(str(directory))
    base = AutoModelForSequenceClassification.from_pretrained(
        known.base_model_name_or_path, revision=known.revision, num_labels=1, dtype=torch.float32
    )
    base.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return PeftModel.from_pretrained(base, str(directory))


def _wrong_settings(config: Any, tokenizer: Any) -> list[str]:
    """What makes some consumer change, or misplace, the score without an error."""
    faults = []
    if config.num_labels != 1:
        faults.append(f"{config.num_labels} labels instead of one")
    if config.problem_type != "regression":
        faults.append(f"problem_type {config.problem_type!r}: servers would apply a sigmoid")
    pad = config.get_text_config().pad_token_id
    if pad is None or pad != tokenizer.pad_token_id or pad == tokenizer.eos_token_id:
        faults.append(
            f"pad is {pad} in the model and {tokenizer.pad_token_id} in the tokenizer, EOS is "
            f"{tokenizer.eos_token_id}: the first two must be the same and differ from the third"
        )
    return faults


@torch.no_grad()
def _scores(model: Any, tokenizer: Any, texts: list[str], side: str) -> torch.Tensor:
    batch = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side=side, add_special_tokens=False
    )
    kept = {name: batch[name] for name in ("input_ids", "attention_mask")}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if side == "left" and "position_ids" in inspect.signature(inner.forward).parameters:
        kept["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    kept = {name: tensor.to(model.device) for name, tensor in kept.items()}
    scores: torch.Tensor = model(**kept).logits[:, 0]
    return scores.cpu()


def main() -> None:
    """Replay the directory named on the command line, within the tolerance that follows it."""
    found = replay(Path(sys.argv[1]))
    tolerance = float(sys.argv[2]) if len(sys.argv) > 2 else 1e-4
    # a NaN is no agreement: "not (x > tolerance)" would let it pass
    agree = all(difference <= tolerance for difference in found["differences"].values())
    found["ok"] = not found["faults"] and agree
    sys.stdout.write(json.dumps(found) + "\n")
    sys.exit(0 if found["ok"] else 1)


if __name__ == "__main__":
    main()
