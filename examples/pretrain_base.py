r"""Pretrain a small base model on dialogue: 46 M parameters, meant to take minutes on one GPU.

    python examples/pretrain_base.py --data dialogue.jsonl.xz --tokenizer MODEL --out base-46m
    hafrm compare recipes/compare-cpu.yaml model.path=base-46m --seeds 5 --out comparison-46m \
        --methods bt,dpo,haf,grm-sft

The data are JSON lines, each a list of {"role", "content"} messages. Conversations are rendered with the
tokenizer's chat template, one after another, and cut into rows. The output is a stock
LlamaForCausalLM directory. A GPU computes in bfloat16 over float32 weights; on a CPU try
`--width 64 --layers 2 --conversations 200`.
"""

import argparse
import json
import lzma
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


def read_conversations(path: Path, limit: int | None) -> Iterator[list[dict[str, str]]]:
    """The first `limit` conversations of a .jsonl or .jsonl.xz file."""
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as lines:
        for number, line in enumerate(lines):
            if number == limit:
                return
            yield json.loads(line)


def token_rows(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, str]]], length: int
) -> Tensor:
    """[rows, length + 1] ids, all conversations end to end; a row's last token is a label only."""
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    ids = [i for text in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in text]
    num_rows = (len(ids) - 1) // length
    if num_rows < 2:
        raise SystemExit(f"{len(ids)} tokens do not make two rows of {length}: give more data")
    starts = range(0, num_rows * length, length)
    return torch.tensor([ids[start : start + length + 1] for start in starts])


def build(tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama of the requested size with random weights."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=8 * args.width // 3 // 64 * 64 or 64,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.width // 64),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def mean_loss(model: LlamaForCausalLM, rows: Tensor, device: torch.device) -> Tensor:
    """Mean negative log-likelihood in nats per token."""
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def factor(step: int, num_steps: int) -> float:
    """Factor on the learning rate: a linear rise over the first 3 %, then half a cosine down to a tenth."""
    warmup = max(1, round(0.03 * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def train(
    model: LlamaForCausalLM, rows: Tensor, args: argparse.Namespace, device: torch.device
) -> None:
    """AdamW over the rows in a seeded order, `--epochs` times; prints the loss some thirty times."""
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(args.epochs)])
    batches = order.split(args.batch_rows)
    start = time.perf_counter()
    for step, batch in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = args.learning_rate * factor(step, len(batches))
        loss = mean_loss(model, rows[batch].to(device, non_blocking=True), device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % max(1, len(batches) // 30) == 0 or step + 1 == len(batches):
            seconds = time.perf_counter() - start
            tokens = (step + 1) * args.batch_rows * args.length
            print(
                f"step {step + 1}/{len(batches)}  loss {loss.item():.3f}  "
                f"{tokens / seconds:,.0f} tokens/s  {seconds:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True, help="a model directory or hub id")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--batch-rows", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--conversations", type=int, help="only the first so many")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    rows = token_rows(
        tokenizer, list(read_conversations(args.data, args.conversations)), args.length
    )
    held_out, rows = rows[: max(1, len(rows) // 100)], rows[max(1, len(rows) // 100) :]
    model = build(tokenizer, args).to(device)
    print(f"{model.num_parameters():,} parameters, {rows.numel():,} tokens, {device}", flush=True)
    train(model, rows, args, device)
    model.eval()
    with torch.no_grad():
        losses = [mean_loss(model, part.to(device), device).item() for part in held_out.split(8)]
    print(f"held-out loss {sum(losses) / len(losses):.3f} nat per token")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
