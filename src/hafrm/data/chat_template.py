"""Chat templates and tokenizers prepared for reward models; what is prepared here is what is exported.

A reward is read at the last token, so what a consumer renders must end in the very EOS that was trained
on: the template is closed (it ends at the EOS), prints no date, and pad is not EOS.
"""

import contextlib
import copy
import ctypes
import re
import threading
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import product
from pathlib import Path

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hafrm.errors import ConfigError, EndlessTemplateError, HafrmError, ModelError
from hafrm.preferences import Message

# Turns as text. The blank after the colon belongs to the content: a prompt that ends in "Assistant: "
# is not a token prefix of prompt + response, one that ends in "Assistant:" is.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}:{{ ' ' }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)

# What the paper (HAF-RM, arXiv 2407.04185) trains its two models on. Its code handles single turns only;
# here an earlier answer ends at the EOS, like the last one.
PAPER_TEMPLATES = {
    "paper-phi-2": (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ 'Instruct: ' ~ message['content'] ~ '\\nOutput:' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' ~ message['content'] ~ eos_token }}"
        "{% if not loop.last %}{{ '\\n' }}{% endif %}"
        "{% else %}{{ message['content'] ~ '\\n' }}{% endif %}"
        "{% endfor %}"
    ),
    "paper-mistral": (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' ~ message['content'] ~ ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] ~ eos_token }}"
        "{% else %}{{ message['content'] ~ '\\n' }}{% endif %}"
        "{% endfor %}"
    ),
}

PROBE_SECONDS = 1.5  # for one short conversation, which takes less than a millisecond
FROZEN_DATE = date(2024, 7, 26)  # any will do; Llama 3.1's own template falls back to this one
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_TODAY_LEFT = re.compile(r"strftime_now(?!\s+is\s+(not\s+)?defined)")

_MARK = "hafrmResponse"
_USER, _SYSTEM = Message("user", "hafrmQuestion"), Message("system", "hafrmSystem")
_EARLIER, _ANSWER = Message("assistant", "hafrmEarlier"), Message("assistant", _MARK)
_ENDS_IN_QUESTION = ((_USER,), (_USER, _EARLIER, _USER), (_SYSTEM, _USER))
_ENDS_IN_ANSWER = tuple((*turns, _ANSWER) for turns in _ENDS_IN_QUESTION)
# in order of preference: pad itself (not that of fill-in-the-middle), reserved tokens, unknown
_PAD_LIKE = (r"(?<!fim_)(?<!fim-)pad", r"reserved|unused|control_\d", r"endoftext|unk")


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, *, close: bool
) -> PreTrainedTokenizerFast:
    """A copy whose `chat_template` is final and which adds no special tokens by itself.

    close=True is for models that we train and export: a missing template is replaced by a plain one,
    the template is closed, and pad is a token other than EOS. close=False is for other reward models:
    the template is used as it is, except that a printed date is frozen. Raises ModelError if it cannot.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        kind = type(tokenizer).__name__
        raise ModelError(f"A fast tokenizer (one with a tokenizer.json) is needed, got {kind}.")
    if close and (tokenizer.eos_token is None or tokenizer.eos_token_id is None):
        raise ModelError(
            "The tokenizer has no EOS token, and the reward is read at the EOS. Set tokenizer.eos_token "
            "to the token that ends an assistant's turn (such as <|im_end|> or </s>)."
        )
    template = freeze_date(_own_template(tokenizer, plain_if_none=close))
    try:
        own = copy.deepcopy(tokenizer)
    except Exception as error:  # a vocabulary that loads, but cannot be saved and loaded again
        raise ModelError(f"The tokenizer is damaged: {error}") from error
    # untyped properties, whose setters also rebuild the post-processor, here without tokens
    for flag in ("add_bos_token", "add_eos_token"):
        setattr(own, flag, False)
    # special tokens that the template writes must be recognised
    own.split_special_tokens = False
    own.init_kwargs.pop("split_special_tokens", None)
    own.backend_tokenizer.no_truncation()
    own.backend_tokenizer.no_padding()
    answers = _rendered_answers(own, template)
    if close:
        template = close_template(own, template)
        own.pad_token = choose_pad(own, "\n".join([written_around_turns(own, template), *answers]))
    own.chat_template = template
    return own


def render_conversations(
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    conversations: Sequence[Sequence[Message]],
    *,
    ask: bool = False,
) -> list[str]:
    """The text of each conversation, with a generation prompt at its end if `ask`; raises TemplateError."""
    try:
        rendered = tokenizer.apply_chat_template(
            [[message._asdict() for message in conversation] for conversation in conversations],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=ask,
        )
        texts = list(map(str, rendered))
        "".join(texts).encode()  # tokenizers accept no lone surrogates
    except (TemplateError, HafrmError):
        raise
    # it is a program: 1 // 0, a macro that calls itself, a loop of 10**9, 'a' * 10**10
    except Exception as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from error
    return texts


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise EndlessTemplateError in a `with` block, in any thread, that runs for longer than `seconds`."""
    own = ctypes.c_ulong(threading.get_ident()), ctypes.py_object(EndlessTemplateError)
    # a signal would reach the main thread only
    timer = threading.Timer(seconds, ctypes.pythonapi.PyThreadState_SetAsyncExc, own)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _own_template(tokenizer: PreTrainedTokenizerFast, *, plain_if_none: bool) -> str:
    if tokenizer.chat_template is not None:
        try:
            return str(tokenizer.get_chat_template())
        except ValueError as error:
            raise ModelError(f"The tokenizer has several templates, set one: {error}") from error
    if not plain_if_none:
        raise ModelError("The tokenizer has no chat template: set the one of its model card.")
    first = tokenizer("a").input_ids[:1]
    adds_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if adds_bos else "") + PLAIN_TEMPLATE


def read_template(name: str) -> str:
    """The template of that name in PAPER_TEMPLATES, or in that file."""
    if name in PAPER_TEMPLATES:
        return PAPER_TEMPLATES[name]
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"model.chat_template is {name!r}, which is neither {' nor '.join(PAPER_TEMPLATES)} nor a "
            f"readable file with a Jinja template: {error}"
        ) from error


def freeze_date(template: str) -> str:
    """The template with every `strftime_now("...")` replaced by `FROZEN_DATE` in that format."""
    frozen = _TODAY.sub(lambda match: repr(FROZEN_DATE.strftime(match[2])), template)
    left = _TODAY_LEFT.search(frozen)
    if left:
        where = frozen[max(left.start() - 40, 0) : left.end() + 40]
        raise _unusable(f"prints today's date, so scores would change: ...{where}...")
    return frozen


def _unusable(problem: str) -> ModelError:
    fix = "Edit tokenizer.chat_template, or set it to None for a plain one"
    return ModelError(f"The chat template {problem}. {fix}.")


def close_template(tokenizer: PreTrainedTokenizerFast, template: str) -> str:
    """The template, wrapped if needed, so that a rendering whose last turn is the assistant's ends exactly
    at the EOS: cut right after it, or with one appended when it writes none. All else renders as before.
    """
    eos = tokenizer.eos_token
    tails = {text.rpartition(_MARK)[2] for text in _rendered_answers(tokenizer, template)}
    if len(tails) != 1:
        raise _unusable(f"ends in different ways after different conversations: {sorted(tails)}")
    tail = tails.pop()
    end = tail.find(eos)
    surplus = tail[end + len(eos) :] if end >= 0 else ""
    if end >= 0 and not surplus:
        return template
    closed = _wrapped(template, surplus=surplus, missing="" if end >= 0 else eos)
    for probe, ask in product((*_ENDS_IN_ANSWER, *_ENDS_IN_QUESTION), (False, True)):
        before = _tried(tokenizer, template, probe, ask=ask)
        if before and probe in _ENDS_IN_ANSWER and not ask:
            head, mark, tail = before[0].rpartition(_MARK)
            before = [head + mark + (tail.partition(eos)[0] if eos in tail else tail) + eos]
        after = _tried(tokenizer, closed, probe, ask=ask)
        if before != after:
            raise _unusable(f"cannot be closed: wrapped it renders {after}, not {before}")
    return closed


def written_around_turns(tokenizer: PreTrainedTokenizerFast, template: str) -> str:
    """What the template writes in probe conversations that end in a question, as one text."""
    # not those that end in an answer: some templates write <think> there, which responses may contain
    return "\n".join(text for p in _ENDS_IN_QUESTION for text in _tried(tokenizer, template, p))


def _tried(
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    turns: Sequence[Message],
    *,
    ask: bool = False,
) -> list[str]:
    """One rendering, or none if the template refuses this kind of conversation (such as a system turn)."""
    with contextlib.suppress(TemplateError), time_limit(PROBE_SECONDS):
        return render_conversations(tokenizer, template, [turns], ask=ask)
    return []


def _rendered_answers(tokenizer: PreTrainedTokenizerFast, template: str) -> list[str]:
    try:  # the first must succeed, a template may refuse the others
        with time_limit(PROBE_SECONDS):
            render_conversations(tokenizer, template, _ENDS_IN_ANSWER[:1])
    except TemplateError as error:
        raise _unusable(f"fails on a question and an answer: {error}") from error
    texts = [text for p in _ENDS_IN_ANSWER for text in _tried(tokenizer, template, p)]
    if any(text.count(_MARK) != 1 for text in texts):
        raise _unusable("does not write the assistant's content exactly once")
    return texts


def _wrapped(template: str, *, surplus: str, missing: str) -> str:
    # The line break after the opening tag and the empty expression before the closing one keep the
    # template's first and last line: transformers renders with trim_blocks and lstrip_blocks. And
    # jinja drops one final line break of a template; inside a block it would stay.
    body = template.removesuffix("\n")
    text = "hafrm_text"
    cut = f"{text}[:-{len(surplus)}] if {text}.endswith({surplus!a}) else {text}"
    ending = f"{text} ~ {missing!a}" if missing else cut
    return (
        f"{{% set {text} %}}\n{body}{{{{ '' }}}}{{% endset %}}"
        "{% if messages[-1]['role'] == 'assistant' and not add_generation_prompt %}"
        f"{{{{ {ending} }}}}{{% else %}}{{{{ {text} }}}}{{% endif %}}"
    )


def choose_pad(tokenizer: PreTrainedTokenizerFast, written: str = "") -> str:
    """The tokenizer's pad if it differs from EOS, else a reserved or unknown token not in `written`."""
    # with pad == eos, consumers would read the reward one token early
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
        f"The tokenizer has no pad token other than its EOS {tokenizer.eos_token!r}, and no special token "
        "that can serve. Add one: tokenizer.add_special_tokens({'pad_token': '<|pad|>'}); resize the "
        "embedding if len(tokenizer) is then above the model's vocab_size."
    )
