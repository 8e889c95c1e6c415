"""`prepare_data`: a recipe's data as token ids, read and encoded once, then opened from a cache.

The cache is keyed by digests of whole files, which provenance computes at each start anyway: size and time
would miss a file that was replaced with its old time. The cache changes no number, only the time it takes.
"""

import hashlib
import itertools
import json
import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from hafrm import atomic, preferences
from hafrm.data import store
from hafrm.data.encoding import Encoder
from hafrm.data.reader import file_digests, parse_sources
from hafrm.data.store import Lazy, StoredTokens, counts_of, store_tokens
from hafrm.errors import CheckpointError, DataError
from hafrm.preferences import Group, TokenizedGroup
from hafrm.recipe import Recipe
from hafrm.run_folder import describe_process
from hafrm.training import parallel, setup

log = logging.getLogger("hafrm")

NUM_GOLDEN = 16  # held-out conversations whose scores are exported
NUM_CACHED = 4  # data sets whose token ids are kept for a later start: the newest ones
_GROUPS = TypeAdapter(list[Group])


@dataclass(frozen=True)
class PreparedData:
    """Encoded groups, and how many rows became what."""

    encoder: Encoder
    train: Sequence[TokenizedGroup]
    validation: Sequence[TokenizedGroup]
    golden: list[Group]  # held-out conversations whose scores are exported for consumers to replay
    counts: dict[str, Any]
    token_digest: str  # of all token ids and comparisons
    file_digests: dict[str, str]  # of the data files, as they were before they were read


def prepare_data(recipe: Recipe, bad_rows_file: Path | None = None) -> PreparedData:
    """Read, split by prompt, check for leakage, and encode; or open the cached result of the same data.
    Raises DataError for unusable data. A process that passes `bad_rows_file` also fills the cache."""
    encoder, data = setup.build_encoder(recipe), recipe.data
    entries = [*data.train, *data.validation, *data.test]

    def look() -> tuple[dict[str, str], Path | None, bool]:
        try:
            digests = file_digests(entries)
        except OSError:  # reading says why
            return {}, None, False
        folder = _cache_of(recipe, encoder, digests)
        return digests, folder, folder is not None and folder.is_dir()

    # only the main rank looks: all must do the same, and files are read once for their digests
    digests, folder, is_cached = parallel.from_main(look)
    cached = _open_cached(folder, encoder, digests, bad_rows_file) if folder and is_cached else None
    if cached is not None:
        return cached
    prepared = _read_and_encode(recipe, encoder, digests, bad_rows_file)
    if folder is None or bad_rows_file is None or not isinstance(prepared.train, Lazy):
        return prepared
    if file_digests(entries) != digests or not _write_cached(folder, prepared, bad_rows_file):
        return prepared
    # in place of our temporary files, which are freed
    return _open_cached(folder, encoder, digests, None) or prepared


def _read_and_encode(
    recipe: Recipe, encoder: Encoder, digests: dict[str, str], bad_rows_file: Path | None
) -> PreparedData:
    reading, to_train, held_out, num_dropped = setup.read_splits(recipe, bad_rows_file)
    train, report = encoder.encode(to_train)
    validation, held_out_report = encoder.encode(held_out)
    report.check(to_train, recipe.data.max_bad_fraction, bad_rows_file)
    held_out_report.check(held_out, recipe.data.max_bad_fraction, bad_rows_file)
    good = (group for i, group in enumerate(held_out) if i not in held_out_report.refused)
    parts = ("data.train", train, report), ("data.validation", validation, held_out_report)
    for name, groups, own in parts:
        if not len(groups) and own.dropped:
            limit = f"data.max_length {recipe.data.max_length}"
            raise DataError(
                f"{name}: all groups are longer than {limit}: raise it, or too_long: cut"
            )
        if not counts_of(groups, "decided").any():
            raise DataError(f"{name} has only ties and comparisons of weight 0; add data to it")
    counts = {
        "rows": reading.num_rows,
        "bad_rows": len(reading.bad_rows) + len(report.refused) + len(held_out_report.refused),
        "unread_columns": list(reading.unread_columns),
        "left_out": reading.left_out,
        "groups_with_shared_prompts_dropped": num_dropped,
        "train_groups": len(train),
        "validation_groups": len(validation),
        "train_comparisons": int(counts_of(train, "comparisons").sum()),
        "ties_not_trained_on": int(counts_of(train, "ties").sum()),
        "identical_comparisons": report.indistinct,
        "encoding": report.counts(),
    }
    _log_counts(counts)
    golden = list(itertools.islice(good, NUM_GOLDEN))
    digest = _digest_of_groups(itertools.chain(train, validation))
    return PreparedData(encoder, train, validation, golden, counts, digest, digests)


def _digest_of_groups(groups: Iterable[TokenizedGroup]) -> str:
    digest = hashlib.sha256()
    for group in groups:
        ids = (group.prompt_ids, *group.response_ids)
        digest.update(repr(([len(i) for i in ids], group.comparisons)).encode())
        for part in ids:
            digest.update(np.ascontiguousarray(part, np.int32).tobytes())
    return digest.hexdigest()


def _cache_of(recipe: Recipe, encoder: Encoder, digests: dict[str, str]) -> Path | None:
    """The folder of the recipe's encoded data, named by everything that it depends on: contents of files,
    tokenizer, template, limits, seed, and our code; None for a hub set that may change."""
    data = recipe.data
    for entry in (*data.train, *data.validation, *data.test):
        for source in parse_sources(entry):
            if source.path is None and not re.search("@[0-9a-f]{40}(:|$)", source.location):
                return None
    own = (preferences.__file__, setup.__file__, __file__)
    code = [*sorted(Path(store.__file__).parent.glob("*.py")), *map(Path, own)]
    parts = [encoder.cache_key, data.model_dump_json(), recipe.training.seed, digests]
    parts += [describe_process()["versions"], *map(atomic.fingerprint, code)]
    return atomic.cache_folder("data") / hashlib.sha256(repr(parts).encode()).hexdigest()


def _write_cached(folder: Path, data: PreparedData, bad_rows_file: Path) -> bool:
    """Whether it could be written."""
    try:
        with atomic.atomic_directory(folder, replace=True) as aside:
            for name, groups in (("train", data.train), ("validation", data.validation)):
                stored = groups if isinstance(groups, StoredTokens) else store_tokens(groups)
                stored.save(aside / name)
            shutil.copy(bad_rows_file, aside / "bad_rows.jsonl")
            rest = {"golden": _GROUPS.dump_python(data.golden, mode="json")}
            rest |= {"counts": data.counts, "token_digest": data.token_digest}
            (aside / "data.json").write_text(json.dumps(rest))
            atomic.write_manifest(aside)
        for old in sorted(folder.parent.iterdir(), key=lambda p: p.stat().st_mtime)[:-NUM_CACHED]:
            atomic.remove_directory(old)
    except (CheckpointError, OSError) as error:
        log.warning("nothing is cached: %s (HAFRM_CACHE names the folder)", error)
        return False
    return True


def _open_cached(
    folder: Path, encoder: Encoder, digests: dict[str, str], bad_rows_file: Path | None
) -> PreparedData | None:
    """What was written there; None if it is damaged, or on another machine."""
    try:
        atomic.check_manifest(folder)
        train, validation = (StoredTokens.open(folder / name) for name in ("train", "validation"))
        rest = json.loads((folder / "data.json").read_bytes())
        if bad_rows_file is not None:
            atomic.atomic_write(bad_rows_file, (folder / "bad_rows.jsonl").read_bytes())
    except (CheckpointError, OSError) as error:
        log.warning("%s is not used: %s", folder, error)
        return None
    log.info("data: token ids of an earlier start, in %s", folder)
    _log_counts(rest["counts"])
    rest |= {"golden": _GROUPS.validate_python(rest["golden"]), "file_digests": digests}
    return PreparedData(encoder, train, validation, **rest)


def _log_counts(counts: dict[str, Any]) -> None:
    """Log one line on what will be trained on, and warnings; DataError if no comparison can teach."""
    num, num_identical = counts["train_comparisons"], counts["identical_comparisons"]
    shortened = counts["encoding"]["shortened"]
    why = "the template or data.max_length leaves nothing of what differs between their responses"
    if num_identical == num:
        raise DataError(f"all {num:,} comparisons have two equal sides as token ids: {why}")
    if not parallel.is_main():
        return
    unread = ", ".join(counts["unread_columns"][:12]) or "none"
    log.info(
        f"data: {counts['rows']} rows ({counts['bad_rows']} bad), {num} comparisons to train on "
        f"({counts['ties_not_trained_on']} ties, {num_identical} identical), columns not read: {unread}"
    )
    if dropped := counts["encoding"]["dropped"]:
        log.warning("%d groups are longer than data.max_length, and are left out", dropped)
    if num_identical:
        log.warning("%d of %d comparisons have two equal sides: %s", num_identical, num, why)
    if shortened:
        what = "responses, such as the thoughts before an answer"
        log.warning("the chat template leaves out a part of %d %s", shortened, what)
