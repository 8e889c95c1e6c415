"""Tokenizers made fit for reward models: only the template writes special tokens, and pad is not EOS.

The copy that `prepare` gives is what we encode with and what is exported, so others get our ids.
It never changes the tokenizer it is given and never adds to a vocabulary.
"""

import copy
import json
import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hafrm.data.template import (
    close_template,
    found_template,
    freeze_date,
    rendered_answers,
    written_around_turns,
)
from hafrm.errors import ModelError

_PAD_LIKE = (r"(?<!fim_)(?<!fim-)pad", r"reserved|unused|control_\d", r"endoftext|unk")


def prepare(tokenizer: PreTrainedTokenizerBase, *, close: bool) -> PreTrainedTokenizerFast:
    """A copy whose `chat_template` is final and which adds no special tokens by itself.

    close=True is for models that we train and export: a missing template is replaced by a plain one,
    the template is closed, and pad is a token other than EOS. close=False is for other people's
    reward models: the template is used literally, except that a printed date is frozen.

    Raises:
        ModelError: no fast tokenizer, no EOS, no usable pad, no template (close=False), a template
            that prints today's date in a way that cannot be frozen or that cannot be closed.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"A fast tokenizer (one with a tokenizer.json) is needed, got {type(tokenizer).__name__}. "
            "Load it with AutoTokenizer, or convert it with transformers' convert_slow_tokenizer."
        )
    if close and (tokenizer.eos_token is None or tokenizer.eos_token_id is None):
        raise ModelError(
            "The tokenizer has no EOS token, and the reward is read at the EOS. Set tokenizer.eos_token "
            "to the token that ends an assistant's turn (such as <|im_end|> or </s>)."
        )
    template = freeze_date(found_template(tokenizer, plain_if_none=close))
    own = _without_habits(tokenizer)
    answers = rendered_answers(own, template)
    if close:
        template = close_template(own, template)
        own.pad_token = choose_pad(own, "\n".join([written_around_turns(own, template), *answers]))
    own.chat_template = template
    return own


def choose_pad(tokenizer: PreTrainedTokenizerFast, written: str = "") -> str:
    """The tokenizer's pad if it differs from EOS, else a reserved or unknown token that no template
    writes (`written` is what it does write). With pad == eos consumers read the reward one token early.

    Raises:
        ModelError: when the vocabulary holds no token that could serve.
    """
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return str(tokenizer.pad_token)
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    free = [
        token.content
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and index not in taken and token.content not in written
    ]
    for pattern in _PAD_LIKE:
        for content in free:
            if re.search(pattern, content, re.IGNORECASE):
                return content
    raise ModelError(
        f"The tokenizer has no pad token other than its EOS {tokenizer.eos_token!r}, and none of its "
        f"{len(free)} other special tokens can serve. Add one before training: "
        "tokenizer.add_special_tokens({'pad_token': '<|pad|>'}). It needs no resizing when "
        "len(tokenizer) is then at most the model's vocab_size (so with Phi-2); else resize the embedding."
    )


def write_no_habits(directory: Path) -> None:
    """Say in a saved tokenizer's config that it adds no BOS or EOS.

    transformers 5 leaves both flags out, and where they are absent some tokenizer classes add a BOS
    to the one that the template has written.
    """
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"add_bos_token": False, "add_eos_token": False}
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_habits(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy that adds no BOS or EOS, cuts and pads nothing, and knows special tokens when it sees them."""
    own = copy.deepcopy(tokenizer)
    # The properties' setters are untyped: they also rebuild the post-processor, here without tokens.
    for habit in ("add_bos_token", "add_eos_token"):
        setattr(own, habit, False)
    own.split_special_tokens = False
    own.init_kwargs.pop("split_special_tokens", None)
    backend = own.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return own
