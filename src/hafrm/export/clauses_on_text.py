"""Clauses on tokenizer and chat template: every consumer must get the same ids for a conversation."""

from hafrm.export.plain_model import PROBES, Finding, PlainModel

_CLOCKS = ("1", "31")
"""Two dates; they differ as text and as numbers."""


def chat_template(plain: PlainModel) -> Finding:
    """The tokenizer loads, and its template writes every turn of a conversation."""
    if not plain.tokenizer.chat_template:
        return Finding(False, "the tokenizer has no chat template")
    lost = [
        turn["content"]
        for probe in PROBES
        for turn in probe
        if turn["content"].strip() not in plain.render(probe)
    ]
    if lost:
        return Finding(False, f"the template leaves out {lost[0][:40]!r}")
    return Finding(True, f"{type(plain.tokenizer).__name__}, renders {len(PROBES)} conversations")


def no_date(plain: PlainModel) -> Finding:
    """Under two clocks the template writes the same text: a date in it changes rewards overnight.

    The clock is a macro in front of the template, which hides the one that transformers offers.
    """
    template = str(plain.tokenizer.chat_template)
    first, second = (
        plain.render(
            PROBES[0], f"{{% macro strftime_now(format) %}}{clock}{{% endmacro %}}{template}"
        )
        for clock in _CLOCKS
    )
    return Finding(first == second, "the same" if first == second else _where(first, second))


def pad_is_not_eos(plain: PlainModel) -> Finding:
    """Config and tokenizer name one pad, which is no EOS: transformers skips trailing pads, servers do not.

    With pad = EOS transformers reads one token early (transformers#35352, RLHFlow#49).
    """
    pad, theirs = plain.text_config.get("pad_token_id"), plain.tokenizer.pad_token_id
    if pad is None:  # where a nested config leaves it to the outer one
        pad = plain.config.get("pad_token_id")
    ends = _ends(plain)
    right = pad is not None and pad == theirs and pad not in ends
    return Finding(right, f"pad {pad} in the config, {theirs} in the tokenizer; EOS {sorted(ends)}")


def ids_have_embeddings(plain: PlainModel) -> Finding:
    """The tokenizer has no more tokens than the model has embeddings."""
    tokens, size = len(plain.tokenizer), plain.text_config.get("vocab_size")
    return Finding(size is not None and tokens <= size, f"{tokens} tokens, {size} embeddings")


def bos_once(plain: PlainModel) -> Finding:
    """A rendered text gives the same ids with and without added special tokens (Skywork, reward-bench#164).

    Pipelines add them, TRL and OpenRLHF do not; where the template has written a BOS, a second one comes.
    """
    bos = plain.tokenizer.bos_token_id
    for text in plain.texts:
        added, bare = (plain.ids(text, add_special_tokens=special) for special in (True, False))
        if bos is not None and added[:2] == [bos, bos]:
            return Finding(False, "the tokenizer adds a BOS to the template's own")
        if added != bare:
            return Finding(False, f"the tokenizer adds ids: {added[:2]}... {added[-2:]}")
    return Finding(True, "no id is added to a rendered text")


def ends_in_eos(plain: PlainModel) -> Finding:
    """A rendered answer ends at an EOS, the one that was trained (TRL#5813, gpt-neox#1285)."""
    ends = _ends(plain)
    trained = {line.input_ids[-1] for line in plain.golden if line.input_ids}
    for probe in PROBES:
        text = plain.render(probe)
        ids = plain.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids[-1] not in ends:
            return Finding(
                False, f"it ends in {text[-24:]!r}; EOS is {plain.tokenizer.eos_token!r}"
            )
        if trained and ids[-1] not in trained:
            return Finding(
                False, f"it ends in id {ids[-1]}, and training read at {sorted(trained)}"
            )
    return Finding(True, f"it ends in {plain.tokenizer.convert_ids_to_tokens(ids[-1])!r}")


def _ends(plain: PlainModel) -> set[int]:
    """Every id that the directory's files name as EOS."""
    ends = {plain.tokenizer.eos_token_id}
    for config in (plain.config, plain.text_config):
        eos = config.get("eos_token_id")
        ends |= set(eos) if isinstance(eos, list) else {eos}
    return {int(end) for end in ends if end is not None}


def _where(first: str, second: str) -> str:
    at = next(
        (k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
    return f"today's date after {first[max(0, at - 24) : at]!r}"
