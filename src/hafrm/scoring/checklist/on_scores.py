"""Clauses on the rewards themselves, computed by plain transformers in float32."""

import torch

from hafrm.scoring.checklist.clause import Finding
from hafrm.scoring.checklist.subject import Subject

_BATCH = 8


def finite(subject: Subject) -> Finding:
    """Every reward is a number; float16 overflows where float32 did not (reward-bench runs float16)."""
    rewards = subject.alone
    bad = int((~torch.isfinite(rewards)).sum())
    if bad:
        return Finding(False, f"{bad} of {len(rewards)} rewards are not finite")
    low, high = float(rewards.min()), float(rewards.max())
    return Finding(True, f"{len(rewards)} rewards from {low:.4g} to {high:.4g}")


def last_token(subject: Subject) -> Finding:
    """transformers reads at the literal last token, as vLLM and SGLang do (TRL#6952, TRL#3750)."""
    by_hand = torch.tensor([subject.score_by_hand(text) for text in subject.texts])
    return _within(subject, subject.furthest(subject.alone, by_hand))


def same_on_both_sides(subject: Subject) -> Finding:
    """Padded left and padded right give the same rewards (TRL#937, reward-bench#137)."""
    parts = _parts(subject)
    right = torch.cat([subject.score(part, "right") for part in parts])
    left = torch.cat([subject.score(part, "left") for part in parts])
    bare = torch.cat([subject.score(part, "left", positions=False) for part in parts])
    holds, found = _within(subject, subject.furthest(left, right))
    shift = subject.furthest(bare, right)
    if holds and not shift <= subject.tolerance:
        found += f"; left padding without position_ids is off by {shift:.2g}: pad right"
    return Finding(holds, found)


def same_in_a_batch(subject: Subject) -> Finding:
    """A text gets the same reward alone and among others (reward-bench#137, NeMo-Aligner#439)."""
    together = torch.cat([subject.score(part) for part in _parts(subject)])
    return _within(subject, subject.furthest(together, subject.alone))


def golden_scores(subject: Subject) -> Finding:
    """The recorded rewards come back, from the recorded ids."""
    if not subject.golden:
        return Finding(None, "the directory brings no golden_scores.jsonl, and none was given")
    largest = 0.0
    for line in subject.golden:
        text = subject.render(line.messages) if line.messages else str(line.text)
        ids = subject.tokenizer(text, add_special_tokens=False)["input_ids"]
        if line.input_ids and tuple(ids) != line.input_ids:
            return Finding(False, f"the template gives other ids for ...{text[-40:]!r}")
        expected = torch.tensor([line.reward])
        difference = subject.furthest(subject.score([text]), expected)
        largest = difference if not difference <= largest else largest  # a NaN stays
    holds, found = _within(subject, largest)
    return Finding(holds, f"{len(subject.golden)} replayed, {found}")


def _parts(subject: Subject) -> list[list[str]]:
    """The texts in batches of unequal lengths; the last one is never of a single text."""
    texts = subject.texts
    parts = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-1].insert(0, parts[-2].pop())
    return parts


def _within(subject: Subject, difference: float) -> Finding:
    found = f"largest difference {difference:.2g} (tolerated {subject.tolerance:g})"
    return Finding(difference <= subject.tolerance, found)  # a NaN is no agreement
