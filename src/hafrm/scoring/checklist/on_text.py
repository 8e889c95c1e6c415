"""Clauses on tokenizer and chat template: the same conversation must become the same ids for everybody."""

from hafrm.scoring.checklist.clause import Finding
from hafrm.scoring.checklist.subject import PROBES, Subject

_CLOCKS = ("1", "31")
"""Two answers of a clock; they differ as text and as numbers."""


def chat_template(subject: Subject) -> Finding:
    """The tokenizer loads, and its template writes every turn of a conversation."""
    if not subject.tokenizer.chat_template:
        return Finding(False, "the tokenizer has no chat template")
    lost = [
        turn["content"]
        for probe in PROBES
        for turn in probe
        if turn["content"].strip() not in subject.render(probe)
    ]
    if lost:
        return Finding(False, f"the template leaves out {lost[0][:40]!r}")
    return Finding(True, f"{type(subject.tokenizer).__name__}, renders {len(PROBES)} conversations")


def no_date(subject: Subject) -> Finding:
    """Under two clocks the template writes the same text: a date in it changes rewards overnight.

    The clock is a macro in front of the template, which hides the one that transformers offers.
    """
    template = str(subject.tokenizer.chat_template)
    first, second = (
        subject.render(
            PROBES[0], f"{{% macro strftime_now(format) %}}{clock}{{% endmacro %}}{template}"
        )
        for clock in _CLOCKS
    )
    return Finding(first == second, "the same" if first == second else _where(first, second))


def pad_is_not_eos(subject: Subject) -> Finding:
    """Config and tokenizer name one pad, which is no EOS: transformers skips trailing pads, servers do not.

    With pad = EOS transformers reads one token early (transformers#35352, RLHFlow#49).
    """
    pad, theirs = subject.text_config.get("pad_token_id"), subject.tokenizer.pad_token_id
    if pad is None:  # where a nested config leaves it to the outer one
        pad = subject.config.get("pad_token_id")
    ends = _ends(subject)
    right = pad is not None and pad == theirs and pad not in ends
    return Finding(right, f"pad {pad} in the config, {theirs} in the tokenizer; EOS {sorted(ends)}")


def ids_have_embeddings(subject: Subject) -> Finding:
    """The tokenizer has no more tokens than the model has embeddings."""
    tokens, rows = len(subject.tokenizer), subject.text_config.get("vocab_size")
    return Finding(rows is not None and tokens <= rows, f"{tokens} tokens, {rows} embeddings")


def bos_once(subject: Subject) -> Finding:
    """A rendered text gives the same ids with and without added special tokens (Skywork, reward-bench#164).

    Pipelines add them, TRL and OpenRLHF do not; where the template has written a BOS, a second one comes.
    """
    bos = subject.tokenizer.bos_token_id
    for text in subject.texts:
        added, plain = (
            subject.tokenizer(text, add_special_tokens=special)["input_ids"]
            for special in (True, False)
        )
        if bos is not None and added[:2] == [bos, bos]:
            return Finding(False, "the tokenizer adds a BOS to the one that the template writes")
        if added != plain:
            return Finding(False, f"the tokenizer adds ids by itself: {added[:2]}... {added[-2:]}")
    return Finding(True, "no id is added to a rendered text")


def ends_in_eos(subject: Subject) -> Finding:
    """A rendered answer ends at an EOS, the one that was trained (TRL#5813, gpt-neox#1285)."""
    ends = _ends(subject)
    trained = {line.input_ids[-1] for line in subject.golden if line.input_ids}
    for probe in PROBES:
        text = subject.render(probe)
        ids = subject.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids[-1] not in ends:
            return Finding(
                False, f"it ends in {text[-24:]!r}; EOS is {subject.tokenizer.eos_token!r}"
            )
        if trained and ids[-1] not in trained:
            return Finding(
                False, f"it ends in id {ids[-1]}, and training read at {sorted(trained)}"
            )
    return Finding(True, f"it ends in {subject.tokenizer.convert_ids_to_tokens(ids[-1])!r}")


def _ends(subject: Subject) -> set[int]:
    """Every id that some part of the directory calls its EOS."""
    ends = {subject.tokenizer.eos_token_id}
    for config in (subject.config, subject.text_config):
        given = config.get("eos_token_id")
        ends |= set(given) if isinstance(given, list) else {given}
    return {int(end) for end in ends if end is not None}


def _where(first: str, second: str) -> str:
    at = next(
        (k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
    return f"today's date behind {first[max(0, at - 24) : at]!r}"
