"""Clauses on the rewards, which plain transformers computes in float32."""

import torch

from hafrm.export.plain_model import Finding, PlainModel, largest_difference

_BATCH = 8


def finite_scores(plain: PlainModel) -> Finding:
    """Every reward is a number; float16 overflows where float32 did not (reward-bench runs float16)."""
    rewards = plain.alone
    bad = int((~torch.isfinite(rewards)).sum())
    if bad:
        return Finding(False, f"{bad} of {len(rewards)} rewards are not finite")
    low, high = float(rewards.min()), float(rewards.max())
    return Finding(True, f"{len(rewards)} rewards from {low:.4g} to {high:.4g}")


def last_token(plain: PlainModel) -> Finding:
    """transformers reads at the literal last token, as vLLM and SGLang do (TRL#6952, TRL#3750)."""
    by_hand = torch.tensor([plain.score_by_hand(text) for text in plain.texts])
    return _within(plain, largest_difference(plain.alone, by_hand))


def same_on_both_sides(plain: PlainModel) -> Finding:
    """Padded left and padded right give the same rewards (TRL#937, reward-bench#137)."""
    parts = _parts(plain)
    right = torch.cat([plain.score(part, "right") for part in parts])
    left = torch.cat([plain.score(part, "left") for part in parts])
    bare = torch.cat([plain.score(part, "left", positions=False) for part in parts])
    holds, observed = _within(plain, largest_difference(left, right))
    shift = largest_difference(bare, right)
    if holds and not shift <= plain.tolerance:
        observed += f"; left padding without position_ids is off by {shift:.2g}: pad right"
    return Finding(holds, observed)


def same_in_a_batch(plain: PlainModel) -> Finding:
    """A text gets the same reward alone and among others (reward-bench#137, NeMo-Aligner#439)."""
    together = torch.cat([plain.score(part) for part in _parts(plain)])
    return _within(plain, largest_difference(together, plain.alone))


def golden_scores(plain: PlainModel) -> Finding:
    """The recorded rewards come back, from the recorded ids."""
    if not plain.golden:
        return Finding(None, "the directory has no golden_scores.jsonl, and none was given")
    replay = plain.replay()
    if replay.faults:
        return Finding(False, replay.faults[0])
    holds, observed = _within(plain, replay.differences["alone"])
    return Finding(holds, f"{len(plain.golden)} replayed, {observed}")


def _parts(plain: PlainModel) -> list[list[str]]:
    """The texts in batches of different lengths; the last one never holds a single text."""
    texts = plain.texts
    parts = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-1].insert(0, parts[-2].pop())
    return parts


def _within(plain: PlainModel, difference: float) -> Finding:
    observed = f"largest difference {difference:.2g} (tolerated {plain.tolerance:g})"
    return Finding(difference <= plain.tolerance, observed)  # False for NaN
