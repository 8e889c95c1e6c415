"""What one of two ranks does in a test of training on several processes."""

import itertools
import os
import shutil
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

# Registers the backend "fake", whose exchanges do nothing, as nccl's do for tensors on the CPU at best.
import torch.testing._internal.distributed.fake_pg
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
from torch.distributed.tensor import DTensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from hafrm.data import store
from hafrm.data.encoding import Encoder
from hafrm.engine import attention
from hafrm.engine.layout import lay_out
from hafrm.engine.model import HybridModel, self_check
from hafrm.errors import CheckpointError, ConfigError, MemoryBudgetError, ModelError, NumericsError
from hafrm.export import stock_export
from hafrm.export.stock_export import export_policy, export_reward
from hafrm.recipe import Recipe
from hafrm.recipe_file import build_recipe, load_recipe
from hafrm.run_folder import RunFolder
from hafrm.scoring.forward import run_forward
from hafrm.training import checkpoint, loop, parallel, run_export
from hafrm.training.methods import get_method, resolve_method
from hafrm.training.setup import build_encoder, build_model
from hafrm.training.sharded_start import build_sharded
from support.models import SHAPES, SIZES, hybrid_of, tiny_hybrid, token_groups
from support.step_pairs import adamw, micro_batches, one_step, pairs


def rank() -> int:
    return int(os.environ["RANK"])


def falling_accuracy(validate):
    """The validation of a run whose first evaluation is its best."""
    count = itertools.count(1)
    return lambda *args: {**validate(*args), "accuracy": 1.0 / next(count)}


def train(recipe: str, folder: str, *options: str) -> None:
    """A run whose proof passes once the other rank's training has returned, and fails after 30 s."""
    ended = Path(folder).with_suffix(".ended")

    def check(_: Path) -> dict[str, float]:
        until = time.monotonic() + 30
        while not ended.exists():
            assert time.monotonic() < until, "the other rank waits for the proof"
            time.sleep(0.01)
        assert not dist.is_initialized(), "nccl waits for ranks that have not left the group"
        return {}

    run_export.check_golden = check
    if "--own-cache" in options:
        os.environ["HAFRM_CACHE"] = str(Path(folder).parent / f"cache-of-{rank()}")
        store.IN_MEMORY = 1000  # so that token ids are cached too
    loop.validate = falling_accuracy(loop.validate)
    finish = (lambda _: parallel.stop()) if "--no-export" in options else None
    resume = "--resume" in options
    loop.run_training(load_recipe(recipe), Path(folder), resume=resume, finish=finish)
    assert parallel.is_main() == (rank() == 0)  # although the group has ended
    with pytest.raises(ConfigError, match="launch them again"):
        parallel.start()
    if rank() == 1:
        ended.touch()


def hosts(_: str) -> None:
    """Hosts exchange through a gloo group of their own, whatever the launcher gave the devices."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, 2, is_master=rank() == 0, wait_for_workers=False)
    dist.init_process_group("fake", store=store, rank=rank(), world_size=2)
    parallel.start()
    assert parallel._hosts._get_backend(torch.device("cpu")).options._timeout == timedelta(hours=12)
    assert float(parallel.add_up(torch.tensor(1.0 + rank()))) == 3.0
    assert parallel.smallest(7 - rank()) == 6
    assert parallel.from_main(lambda: f"rank {rank()}") == "rank 0"

    def refuse() -> None:
        assert rank() == 0
        raise CheckpointError("in use")

    with pytest.raises(CheckpointError, match="in use"):
        parallel.from_main(refuse)
    value = torch.arange(3.0) if rank() == 0 else None
    assert parallel.hand_out(value, torch.zeros(3)).tolist() == [0.0, 1.0, 2.0]
    parallel.wait()


def towers(_: str) -> None:
    """DDP's steps are those of one process although an image tower gets no gradient."""
    sizes = {**SIZES, "head_dim": 8, "num_key_value_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=sizes, vision_config=vision, image_token_index=3)

    def train(wrap, own: slice) -> torch.Tensor:
        torch.manual_seed(0)
        model = hybrid_of(Gemma3ForConditionalGeneration(config))
        optimizer, wrapped = adamw(model), wrap(model)
        for _ in range(2):
            batches = micro_batches(pairs()[own], 100)
            assert len(batches) > 1
            one_step(wrapped, batches, get_method("bt"), optimizer)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    expected = train(lambda model: model, slice(16))
    ranks = parallel.start()
    half = slice(8 * ranks.rank, 8 * ranks.rank + 8)
    found = train(lambda model: parallel.wrap(model, ranks), half)
    assert torch.allclose(found, expected, atol=1e-4)
    parallel.stop()


def sharded(model: HybridModel, precision: torch.dtype | None = None) -> HybridModel:
    parallel.shard(model, parallel.start(), precision=precision)
    return model


def shards(folder: str) -> None:
    """What a forward without a backward leaves gathered is neither saved nor loaded into."""
    model = sharded(tiny_hybrid(), torch.bfloat16)
    optimizer = adamw(model)
    layout = lay_out(token_groups(SHAPES))

    caches = []
    attend = attention._attend
    attention._attend = lambda q, k, v, layout, rule: (
        caches.append(id(layout.masks)) or attend(q, k, v, layout, rule)
    )
    outputs = model(layout)
    attention._attend = attend
    assert caches == [id(layout.masks)] * 2, "the layers have layouts of their own"
    (outputs.rewards.sum() + outputs.logps.sum()).backward()
    optimizer.step()

    before = checkpoint.trainable_weights(model)
    run = RunFolder(Path(folder))
    with torch.no_grad():
        model(layout)
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "the root stays gathered"
    model.set_reshard_after_forward(False)  # as FSDP2 treats a root by default
    with torch.no_grad():
        model(layout)
    assert sum(p.dtype == torch.bfloat16 for p in model.parameters()) > 0
    path = checkpoint.save_checkpoint(run, 1, model, optimizer, {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model(layout)
    optimizer.state.clear()
    assert checkpoint.load_checkpoint(path, model, optimizer) == {"step": 1}
    after = checkpoint.trainable_weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(len(optimizer.state[p]) == 3 for p in model.parameters())
    storages = [p.to_local().untyped_storage() for p in model.parameters()]
    parallel.release(model)
    assert sum(storage.nbytes() for storage in storages) == 0


def scores() -> None:
    """Rows dealt out to ranks: the bits of one process, equal forwards, no rank stops or halves alone."""
    groups, alone = pairs(), tiny_hybrid().eval()
    model = sharded(tiny_hybrid()).eval()
    forward, rows = HybridModel.forward, []

    def counted(self, layout):
        rows.append(layout.num_tokens)
        return forward(self, layout)

    for max_tokens, num_forwards in ((80, 2), (10_000, 1)):
        HybridModel.forward = forward
        expected = run_forward(alone, groups, max_tokens=max_tokens)
        HybridModel.forward = counted
        rows.clear()
        shared = parallel.score_on_all_ranks(model, groups, max_tokens=max_tokens)
        assert (shared.rewards == expected.rewards).all()
        assert (shared.logps == expected.logps).all()
        assert len(rows) == num_forwards, rows

    def short(self, layout):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    alone.reward_head.weight.data[0, 0] = float("nan")
    HybridModel.forward = forward
    with pytest.raises(NumericsError, match="not finite"):
        parallel.score_on_all_ranks(alone, groups, max_tokens=10_000)
    HybridModel.forward = short
    with pytest.raises(MemoryBudgetError, match=r"lower training\.max_tokens"):
        parallel.score_on_all_ranks(model, groups, max_tokens=10_000)


def evaluate(*arguments: str) -> None:
    """`hafrm evaluate ARGUMENTS`; the result is written by one rank."""
    from hafrm.cli import app

    app(["evaluate", *arguments], standalone_mode=False)


def sharded_start(folder: str) -> None:
    """A model that each rank reads its rows of, against one that `from_pretrained` loads whole."""
    ranks = parallel.start()
    for base in sorted(Path(folder).glob("base-*")):
        adapted = [False] if base.name == "base-experts" else [False, True]  # routers take none
        precisions = ["fp32", "bf16"] if base.name == "base-llama" else ["fp32"]
        for lora, precision in itertools.product(adapted, precisions):
            recipe = sharded_recipe(base, lora, precision)
            encoder, method = build_encoder(recipe), resolve_method(recipe)
            torch.manual_seed(0)
            expected = build_model(recipe, method, encoder, ranks.device)
            torch.manual_seed(0)
            model = build_sharded(recipe, method, encoder, ranks)
            assert all(isinstance(p, DTensor) for p in model.parameters())
            parameters = dict(model.named_parameters())
            assert parameters.keys() == dict(expected.named_parameters()).keys()
            for name, value in expected.named_parameters():
                whole = parallel.whole(parameters[name].detach())
                assert torch.equal(whole, value.detach()), (base, lora, precision, name)
                assert parameters[name].requires_grad == value.requires_grad
            for ours, theirs in zip(model.buffers(), expected.buffers(), strict=True):
                assert torch.equal(ours, theirs)
            exports_are_equal(model, expected, encoder, base)
            if base.name == "base-llama":
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    self_check(model, lay_out(token_groups(SHAPES)))
                gradients_do_not_depend_on_when_they_are_exchanged(model, precision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock_export, "write_files", full_disk)  # the other rank has no file to write
        with pytest.raises(CheckpointError, match="disk full"):
            parallel.on_all(lambda: export_reward(model, encoder, Path(folder) / "full"))
    incomplete = sharded_recipe(Path(folder) / "incomplete", lora=False, precision="fp32")
    with pytest.raises(ModelError, match="without 1 weights"):
        build_sharded(incomplete, method, encoder, ranks)
    parallel.stop()


def full_disk(*_) -> None:
    raise OSError("disk full")


def exports_are_equal(
    model: HybridModel, expected: HybridModel, encoder: Encoder, base: Path
) -> None:
    """To the bit, with adapters that change the model, one head in each dtype."""
    whole = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            value = torch.randn_like(whole[name])
            whole[name].data.copy_(value)
            parameter.data.copy_(parallel.hand_out(value, parameter.detach()))
    folder = base.with_name(f"exports-{base.name}")
    heads = {"reward": (export_reward, torch.float32), "policy": (export_policy, torch.bfloat16)}
    for head, (export, dtype) in heads.items():
        for name, source in (("sharded", model), ("whole", expected)):
            export(source, encoder, folder / name / head, dtype=dtype)
        if rank() == 0:
            for file in sorted((folder / "whole" / head).iterdir()):
                other = folder / "sharded" / head / file.name
                assert file.read_bytes() == other.read_bytes(), (base, head, dtype, file.name)
            shutil.rmtree(folder)
        parallel.wait()


def sharded_recipe(base: Path, lora: bool, precision: str) -> Recipe:
    training = {"parallel": "hsdp" if lora else "fsdp", "precision": precision, "max_tokens": 256}
    data = {"train": "-", "max_length": 64}
    sections = {"lora": {"rank": 4, "alpha": 8.0}} if lora else {}
    own = {"model": {"path": str(base)}, "data": data, "method": {"name": "haf"}}
    return build_recipe({**own, "training": training, **sections})


def gradients_do_not_depend_on_when_they_are_exchanged(model: HybridModel, precision: str) -> None:
    """Once a step, or in every micro-batch, which leaves no whole gradient."""
    gradients = []
    for always in (False, True):
        for number in range(3):
            with parallel.synchronise(model, last=always or number == 2):
                half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
                with half:
                    outputs = model(lay_out(token_groups(SHAPES, seed=10 * number + rank())))
                (outputs.rewards.square().sum() + outputs.logps.sum() / 50).backward()
            if number < 2:
                held = [p.grad is not None for p in model.parameters()]
                assert any(held) == always
        gradients.append([parallel.whole(p.grad) for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
    for once, often in zip(*gradients, strict=True):
        assert torch.allclose(once, often, rtol=1e-4, atol=1e-5 * float(once.abs().max()))


def sequences() -> None:
    """Two ranks run each sequence together: outputs and gradients are those of one, checkpointed or not."""
    layout = lay_out(token_groups(SHAPES))
    for family in ("llama", "mistral", "gemma2", "gpt2", "phi3"):
        alone, both = tiny_hybrid(family), tiny_hybrid(family)
        if family == "llama":
            both.checkpoint_activations()
        parallel.shard(both, parallel.start(), "ulysses")
        assert both.team.size == 2
        self_check(both, layout)
        results = []
        for model in (alone, both):
            outputs = model(layout)
            # one rank of a team counts the loss; FSDP2 takes the mean over ranks
            factor = 2.0 * (rank() == 0) if model is both else 1.0
            (factor * (outputs.rewards.square().sum() + outputs.logps.sum() / 50)).backward()
            gradients = {n: parallel.whole(p.grad) for n, p in model.named_parameters()}
            results.append({"rewards": outputs.rewards, "logps": outputs.logps, **gradients})
        for name, value in results[0].items():
            difference = float((value - results[1][name]).abs().max() / value.abs().max())
            assert difference < 1e-5, (family, name, difference)


def traffic(file: str) -> None:
    """Write the bytes that a rank gets in one step: half of what FSDP2 gathers, and of what it scatters."""
    moved = []

    def count(kind: type, tensor: str) -> None:
        exchange = kind.__call__
        kind.__call__ = lambda *args, **options: (
            moved.append(options[tensor].nbytes / 2) or exchange(*args, **options)
        )

    count(collectives.DefaultAllGather, "output_tensor")
    count(collectives.DefaultReduceScatter, "input_tensor")
    model = tiny_hybrid()
    model.checkpoint_activations()
    outputs = sharded(model, torch.bfloat16)(lay_out(token_groups(SHAPES)))
    (outputs.rewards.sum() + outputs.logps.sum()).backward()
    if rank() == 0:
        Path(file).write_text(str(sum(moved)))
    parallel.stop()


def sharded_model(folder: str) -> None:
    parallel.start()
    shards(folder)
    sequences()
    scores()
    parallel.stop()
