"""Two processes take the same steps as one: DDP, FSDP2 and Ulysses on gloo, ranks with unequal tokens."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from hafrm.recipe import Recipe
from hafrm.recipe_file import dump_recipe
from hafrm.run_folder import read_json_lines
from hafrm.tensor_files import TensorFiles
from hafrm.training import loop, parallel
from hafrm.training.loop import run_training
from support import parallel_worker
from support.chat_tokenizers import chat_tokenizer
from support.forked import on_ranks
from support.models import GPT2, GROUPED
from support.tiny_runs import tiny_recipe

STEP_WIDE = {"reward_loss": "normbt", "sum_to_zero": 0.1}
LORA = {"rank": 4, "alpha": 8.0}


def launch(recipe: Recipe, folder: Path, *options: str, size: int = 2) -> None:
    """Run the recipe in several processes, of which the second must end before the proof."""
    file = folder.with_suffix(".yaml")
    file.write_text(dump_recipe(recipe))
    on_ranks("train", folder.parent, str(file), str(folder), *options, size=size)


def assert_same_training(one: Path, two: Path) -> None:
    """Losses to 1e-4, exported weights to 1e-5: sums in another order, through Adam (eps 1e-4)."""
    for ours, theirs in zip(
        read_json_lines(one / "metrics.jsonl"), read_json_lines(two / "metrics.jsonl"), strict=True
    ):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    for kind in ("reward", "policy"):
        first, second = (load_file(f / "model" / kind / "model.safetensors") for f in (one, two))
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.allclose(value, second[name], atol=1e-5), name


def recipe_for(folder: Path, mode: str, **sections: Any) -> Recipe:
    """Groups of 20 to 60 tokens in micro-batches of 128, so ranks hold different numbers of tokens."""
    training = {"max_tokens": 128, "eps": 1e-4, "parallel": mode, "steps": 4}
    return tiny_recipe(folder, training=training, evaluation={"every": 2}, **sections)


@pytest.mark.parametrize(
    ("mode", "sections"),
    [
        ("ddp", {}),
        ("fsdp", {}),
        ("ulysses", {}),
        *(
            pytest.param(mode, sections, marks=pytest.mark.slow)
            for mode in ("ddp", "fsdp")
            for sections in ({"lora": LORA}, {"method": STEP_WIDE})
        ),
    ],
)
def test_two_processes_train_as_one_and_the_second_has_ended_before_the_proof(
    tmp_path, monkeypatch, mode, sections
):
    """Rewards and distances are added over ranks, or each would follow its own tokens. The proof takes an
    hour on one host: an exchange on the devices would time out. Each evaluation is worse than the one
    before, so step 2 of 4 is exported."""
    recipe = recipe_for(tmp_path, mode, **sections)
    monkeypatch.setattr(loop, "validate", parallel_worker.falling_accuracy(loop.validate))
    assert run_training(recipe, tmp_path / "one").best_step == 2
    launch(recipe, tmp_path / "two")
    assert_same_training(tmp_path / "one", tmp_path / "two")
    weights, moments = (
        TensorFiles((tmp_path / "two/checkpoints/step-2").glob(f"{name}*.safetensors")).names
        for name in ("model", "optimizer")
    )
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert moments == {"rng", *(f"{kind}/{name}" for name in weights for kind in kinds)}


@pytest.mark.slow
def test_a_sharded_run_is_resumed_by_one_process_and_by_four(tmp_path):
    """From the rows that each of two ranks wrote; losses to 1e-4 and weights to 1e-5, as above."""
    recipe = recipe_for(tmp_path, "fsdp")
    launch(recipe, tmp_path / "two", "--no-export")
    folders = {size: shutil.copytree(tmp_path / "two", tmp_path / str(size)) for size in (1, 4)}
    for folder in folders.values():
        shutil.rmtree(folder / "checkpoints/step-4")
    run_training(recipe, folders[1], resume=True, finish=lambda _: None)
    launch(recipe, folders[4], "--no-export", "--resume", size=4)
    expected = read_json_lines(tmp_path / "two/metrics.jsonl")
    for size, folder in folders.items():
        lines = zip(read_json_lines(folder / "metrics.jsonl"), expected, strict=True)
        assert all(own["loss"] == pytest.approx(line["loss"], abs=1e-4) for own, line in lines)
        files = sorted((folder / "checkpoints/step-4").glob("model*.safetensors"))
        assert len(files) == size
        stored = TensorFiles((tmp_path / "two/checkpoints/step-4").glob("model*.safetensors"))
        for name in stored.names:
            assert torch.allclose(TensorFiles(files).read(name), stored.read(name), atol=1e-5), name


@pytest.mark.parametrize("check", ["hosts", "sharded_model", "towers"])
def test_what_two_ranks_exchange_is_what_one_process_has(tmp_path, check):
    """The checks are functions of parallel_worker."""
    on_ranks(check, tmp_path, str(tmp_path))


def test_a_model_read_in_shards_is_the_one_that_transformers_loads_whole(tmp_path):
    """Full and LoRA, tied and not, with GPT-2's other names and experts that need conversion, one in both
    precisions. Files that the index does not name are not read; a missing weight is an error."""
    tokenizer = chat_tokenizer()
    sizes = {**GROUPED, "vocab_size": len(tokenizer)}
    causal = {
        "llama": LlamaForCausalLM(LlamaConfig(**sizes)),
        "tied": LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)),
        "gpt2": GPT2LMHeadModel(GPT2Config(**GPT2 | {"vocab_size": len(tokenizer)})),
        "experts": MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)),
    }
    for name, model in causal.items():
        base = tmp_path / f"base-{name}"
        model.to(torch.bfloat16).save_pretrained(base, max_shard_size="20KB")
        tokenizer.save_pretrained(base)
        stale = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
        save_file(stale, base / "consolidated.safetensors")
    incomplete = tmp_path / "incomplete"
    shutil.copytree(tmp_path / "base-llama", incomplete)
    weights = {k: v for k, v in causal["llama"].state_dict().items() if k != "model.norm.weight"}
    causal["llama"].save_pretrained(incomplete, state_dict=weights)
    (incomplete / "model.safetensors.index.json").unlink()
    on_ranks("sharded_start", tmp_path, str(tmp_path))


def test_ranks_whose_caches_differ_do_as_the_main_rank_does(tmp_path):
    """The first run leaves reference and token ids in the main rank's cache alone; in the second one, the
    other rank encodes its own, and both train on the same."""
    sections = {"training": {"steps": 1, "max_tokens": 128}}
    recipe, losses = tiny_recipe(tmp_path, **sections), []
    for name in ("first", "second"):
        launch(recipe, tmp_path / name, "--own-cache", "--no-export")
        losses.append([r["loss"] for r in read_json_lines(tmp_path / name / "metrics.jsonl")])
    for kind in ("reference", "data"):
        assert list((tmp_path / "cache-of-0").rglob(f"{kind}/*"))
        assert not list((tmp_path / "cache-of-1").rglob(f"{kind}/*"))
    assert losses[0] == losses[1]


def test_a_rank_without_a_world_size_is_one_process_that_writes(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert parallel.start().rank == 0
    assert parallel.is_main()
