"""Kill hafrm at random moments, resume it, and compare with a run that nobody killed, byte for byte.

    python tools/kill_storm.py [--kills 200] [--seed 0] [--only train-lora] [--folder DIR]

Six commands take their share of the kills: training in full, with LoRA and on two processes, bulk scoring,
a comparison of methods, and RLHF. A kill is SIGKILL, after a random time or as soon as a file is being
written under its temporary name; of the process alone or of its children too. Then the command is resumed,
and killed again, until it ends. Every file it leaves is compared but provenance.json and manifest.json (one
entry for each process, and the digest of such a file), lock files, and the times and speeds in JSON.
Prints a table; with --folder it works there and keeps what differs.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("src", "tests")]


import hafrm.bulk.bulk_job
import hafrm.cli
import hafrm.evaluation
import hafrm.rlhf.train_policy
import hafrm.study.study_runs
import hafrm.training.loop
from support.tiny_rlhf import write_prompts, write_reward
from support.tiny_runs import write_base, write_preferences

Process = multiprocessing.get_context("fork").Process
TIMES = {"comparisons_per_second", "tokens_per_second", "seconds"}
NOT_COMPARED = ("provenance.json", "manifest.json", ".lock")
BEFORE_A_STEP = (".recipe.yaml.", ".provenance.json.", ".manifest.json.")  # no save, no export
TRAIN = """
model: {path: base}
data: {train: pairs.jsonl, validation_fraction: 0.2, max_length: 64}
training: {steps: 20, batch_size: 4, max_tokens: 256, learning_rate: 1e-3}
evaluation: {every: 5}
checkpoint: {every: 2, keep: 2}
tracking: {log_every: 10}
"""
RLHF = """
model: {path: base}
data: {train: prompts.jsonl, validation_fraction: 0.3, max_prompt_length: 40}
reward: {model: reward}
sampling: {max_new_tokens: 6}
training: {steps: 8, batch_size: 8, responses_per_prompt: 2, learning_rate: 1e-3, max_tokens: 128}
evaluation: {every: 2, prompts: 4}
checkpoint: {every: 1, keep: 2}
tracking: {log_every: 3}
"""
SCORE = "score reward rows.jsonl --rows-per-shard 40 --out {out}"
COMPARE = "compare compare.yaml --methods bt,haf --seeds 1 --learning-rates 1e-3 --out {out}"
COMMANDS = {  # name: the first command, the one that resumes it, processes
    "train-full": ("train train.yaml --out {out}", "train --resume {out}", 1),
    "train-lora": ("train train.yaml lora.rank=4 --out {out}", "train --resume {out}", 1),
    "train-two": ("train train.yaml --out {out}", "train --resume {out}", 2),
    "score": (SCORE, SCORE, 1),
    "compare": (COMPARE, COMPARE, 1),
    "rlhf": ("rlhf rlhf.yaml --out {out}", "rlhf --resume {out}", 1),
}


def prepare() -> None:
    """A tiny base, a tiny reward model, data and recipes in the current folder."""
    write_base(Path())
    write_reward(Path())
    write_prompts(Path("prompts.jsonl"))
    write_preferences(Path("pairs.jsonl"), 60)
    write_preferences(Path("rows.jsonl"), 400)
    write_preferences(Path("test.jsonl"), 20, start=400)
    Path("train.yaml").write_text(TRAIN)
    Path("compare.yaml").write_text(TRAIN.replace("data: {", "data: {test: test.jsonl, "))
    Path("rlhf.yaml").write_text(RLHF)


def run_command(command: str, log: Path, variables: dict[str, str]) -> None:
    """What a forked process does: the command, with a process group and a log of its own."""
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ |= variables
    sys.argv = ["hafrm", *command.split()]
    hafrm.cli.main()


def start(command: str, num_processes: int, port: int, log: Path) -> list[Process]:
    """Fork the processes of a command."""
    log.unlink(missing_ok=True)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in map(str, range(num_processes)):
        if num_processes > 1:
            variables |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(num_processes)}
        processes.append(Process(target=run_command, args=(command, log, variables)))
        processes[-1].start()
    return processes


def wait(processes: list[Process], until: Callable[[], bool]) -> list[int] | None:
    """Exit codes once all have ended, or None as soon as `until` is true."""
    while None in (codes := [process.exitcode for process in processes]):
        if any(codes):  # a rank failed: torchrun would end the others
            kill([process for process in processes if process.exitcode is None])
        elif until():
            return None
        time.sleep(0.001)
    return [code for code in codes if code is not None]


def kill(processes: list[Process], *, with_children: bool = True, apart: float = 0.0) -> None:
    """SIGKILL, `apart` seconds from one process to the next."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            (os.killpg if with_children else os.kill)(process.pid, signal.SIGKILL)
        time.sleep(apart)
    for process in processes:
        process.join()


def leftovers(folder: Path) -> set[str]:
    """What is there under a temporary name."""
    names = (Path(at, name) for at, folders, files in os.walk(folder) for name in folders + files)
    return {str(p) for p in names if p.name.endswith(".tmp") or p.name == "model.unverified"}


def contents(out: Path) -> dict[str, str]:
    """The digest of every file that two equal runs must share, without times."""
    digests, drop_times = {}, lambda pairs: [pair for pair in pairs if pair[0] not in TIMES]
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.name not in NOT_COMPARED):
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            texts = content.splitlines() if path.suffix == ".jsonl" else [content]
            content = json.dumps(
                [json.loads(t, object_pairs_hook=drop_times) for t in texts]
            ).encode()
        digests[str(path.relative_to(out))] = hashlib.sha256(content).hexdigest()
    return digests


class Storm:
    """One command's cycles: kills, resumes, and the comparison when it has ended."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.rng, self.out = name, random.Random(f"{seed} {name}"), Path(f"out-{name}")
        self.first, self.again, self.num_processes = COMMANDS[name]
        self.log, self.port = Path(f"log-{name}.txt"), self.rng.randrange(20_000, 32_000)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        began = time.monotonic()
        codes = self.run(lambda: False)
        if any(codes or []):
            sys.exit(f"{name} fails without a kill: {codes}\n{self.log.read_text()}")
        self.seconds = time.monotonic() - began
        self.expected = contents(self.out)
        shutil.rmtree(self.out)
        print(f"{name}: {self.seconds:.1f} s without a kill", flush=True)

    def run(self, until: Callable[[], bool]) -> list[int] | None:
        """Start or resume the command; None where `until` came true first, and then it is dead."""
        command = self.again if (self.out / "recipe.yaml").exists() else self.first
        self.port += 1
        processes = start(command.format(out=self.out), self.num_processes, self.port, self.log)
        codes = wait(processes, until)
        if codes is None:
            self.rng.shuffle(processes)
            apart = self.rng.random() * 0.05
            kill(processes, with_children=self.rng.random() < 0.5, apart=apart)
        return codes

    def moment(self, before: set[str]) -> Callable[[], bool]:
        """True at a random time, or when this start writes its n-th file."""
        if self.rng.random() < 0.4:
            at = time.monotonic() + self.rng.random() * self.seconds
            return lambda: time.monotonic() > at
        num, written = self.rng.choice((1, 2, 3, 6, 12, 20)), set[str]()

        def writes() -> bool:
            written.update(leftovers(self.out) - before)
            return len(written) >= num

        return writes

    def cycle(self) -> None:
        """Kills and resumes until the command ends, then the comparison."""
        if self.rng.random() < 0.3:
            shutil.rmtree("cache", ignore_errors=True)
        codes, num_kills = None, 0
        for _ in range(self.rng.choice((3, 4, 6))):
            before = leftovers(self.out)
            codes = self.run(self.moment(before))
            if codes is not None:
                break
            num_kills += 1
            cut = [Path(name).name for name in leftovers(self.out) - before]
            cut = [name for name in cut if not name.startswith(BEFORE_A_STEP)]
            self.counts["during an export"] += (exports := any("model" in name for name in cut))
            self.counts["during a save"] += bool(cut) and not exports
        late = time.monotonic() + 60 + 10 * self.seconds
        codes = codes or self.run(lambda: time.monotonic() > late)
        self.counts += Counter({"kills": num_kills, "resumed to the end": 1})
        differ = sorted({name for name, _ in contents(self.out).items() ^ self.expected.items()})
        self.counts["equal"] += not differ
        if codes is None or any(codes):
            self.faults.append(
                f"exit codes {codes} (None: it hangs): {self.log.read_text()[-600:]}"
            )
        elif differ:
            self.faults.append(f"different after {num_kills} kills: {differ}")
        self.faults += [f"left behind: {name}" for name in sorted(leftovers(self.out))]
        if differ:
            shutil.copytree(self.out, f"differs-{self.name}-{self.counts['resumed to the end']}")
        shutil.rmtree(self.out)


def main() -> None:
    """Run the storm and print its table; exits with 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=COMMANDS)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="hafrm-storm-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    os.environ["HAFRM_CACHE"] = str(Path.cwd() / "cache")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # in a process of its own: the threads of a torch that has computed would be lost in a fork
    (preparation := Process(target=prepare)).start()
    preparation.join()
    storms = [Storm(name, args.seed) for name in ([args.only] if args.only else COMMANDS)]
    for storm in storms:
        while storm.counts["kills"] < -(-args.kills // len(storms)):
            storm.cycle()
            print(f"{storm.name}: {dict(storm.counts)} {storm.faults[-1:]}", flush=True)
    columns = ("kills", "during a save", "during an export", "resumed to the end", "equal")
    print("| command |", " | ".join(columns), "| faults |\n|" + "---|" * (len(columns) + 2))
    for storm in storms:
        row = [storm.name, *(storm.counts[column] for column in columns), len(storm.faults)]
        print("|", " | ".join(map(str, row)), "|")
    left = leftovers(Path())
    print(f"left under a temporary name: {sorted(left) or 'nothing'}")
    if not args.folder:
        shutil.rmtree(folder)
    sys.exit(bool(left) or any(storm.faults for storm in storms))


if __name__ == "__main__":
    main()
