"""Chat templates are closed at the EOS, free of dates, and otherwise render as before."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date

import pytest
from transformers import ByT5Tokenizer

from hafrm.data.chat_template import (
    FROZEN_DATE,
    PAPER_TEMPLATES,
    choose_pad,
    close_template,
    freeze_date,
    prepare_tokenizer,
    read_template,
    time_limit,
)
from hafrm.data.chat_template import render_conversations as render
from hafrm.data.encoding import Encoder
from hafrm.errors import ConfigError, EndlessTemplateError, ModelError
from hafrm.preferences import Group, Message
from support.chat_tokenizers import (
    CHATML,
    GEMMA_LIKE,
    LLAMA3_LIKE,
    MISTRAL_LIKE,
    TEMPLATES,
    chat_tokenizer,
    llama_like_tokenizer,
    plain_tokenizer,
)

USER = Message("user", "  How do I bake bread?\n")
ANSWER = Message("assistant", "Mix flour, water and salt. ")
SYSTEM = Message("system", "You are a helpful assistant.")
ENDS_IN_ANSWER = ([USER, ANSWER], [USER, ANSWER, USER, ANSWER], [SYSTEM, USER, ANSWER])
ENDS_IN_QUESTION = ([USER], [USER, ANSWER, USER], [SYSTEM, USER])
# Beginnings and ends that jinja's whitespace rules treat specially: a wrapper must not disturb them.
ODD = {
    "begins with a line break": "\n" + CHATML,
    "begins with an indented tag": "    {% set ns = namespace(n=0) %}\n" + CHATML,
    "ends in a line break": CHATML + "\n",
    "ends in blanks": CHATML + "\n   ",
    "ends in a stripping tag": CHATML.removesuffix("{% endif %}") + "{%- endif -%}\n",
    "renames messages": "{% set messages = messages[-3:] %}" + CHATML,
    "marks generations": CHATML.replace(
        "m['content']", "m['content'] }}{% generation %}{% endgeneration %}{{ ''"
    ),
}


def test_a_line_break_behind_the_eos_is_cut_and_a_missing_eos_is_appended() -> None:
    tokenizer = chat_tokenizer(CHATML)
    closed = close_template(tokenizer, CHATML)
    (text,) = render(tokenizer, closed, [[SYSTEM, ANSWER]])
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>assistant\nMix flour, water and salt. <|im_end|>"
    )
    (text,) = render(tokenizer, close_template(tokenizer, GEMMA_LIKE), [[USER, ANSWER]])
    assert text.endswith("<|im_start|>model\nMix flour, water and salt.<|sep|>\n<|im_end|>")


@pytest.mark.parametrize("template", [*TEMPLATES.values(), *ODD.values()], ids=[*TEMPLATES, *ODD])
def test_a_closed_template_differs_from_the_original_behind_the_eos_only(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    closed = close_template(tokenizer, template)
    assert close_template(tokenizer, closed) == closed
    assert (closed == template) == (
        template in (LLAMA3_LIKE, MISTRAL_LIKE)
    )  # end in the EOS already
    assert freeze_date(template) == template
    for conversation in (*ENDS_IN_ANSWER, *ENDS_IN_QUESTION):
        if template == GEMMA_LIKE and conversation[0] is SYSTEM:
            continue
        for prompted in (False, True):
            before, after = (
                render(tokenizer, t, [conversation], ask=prompted)[0] for t in (template, closed)
            )
            if conversation in ENDS_IN_ANSWER and not prompted:
                end = before.rfind("<|im_end|>")
                before = (before[:end] if end > 0 else before) + "<|im_end|>"
            assert after == before


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }}", "exactly once"),
        ("{{ raise_exception('no') }}", "fails on a question and an answer"),
        (CHATML + "{{ messages | length }}", "different ways"),
    ],
    ids=["drops the answer", "always fails", "ends in a number that varies"],
)
def test_a_template_that_cannot_be_closed_is_refused(template: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        close_template(chat_tokenizer(), template)


def test_a_printed_date_is_frozen_in_its_own_format() -> None:
    """26 July 2024 as Llama 3.2 and as gpt-oss would write it."""
    llama = '{%- if strftime_now is defined %}{%- set d = strftime_now("%d %b %Y") %}{%- endif %}{{ d }}'
    assert date(2024, 7, 26) == FROZEN_DATE
    tokenizer = chat_tokenizer()
    assert render(tokenizer, freeze_date(llama), [[USER]]) == ["26 Jul 2024"]
    assert render(tokenizer, freeze_date("{{ strftime_now('%Y-%m-%d') }}"), [[USER]]) == [
        "2024-07-26"
    ]
    assert date.today().strftime("%d %b %Y") in render(tokenizer, llama, [[USER]])[0]


@pytest.mark.parametrize(
    "template", ["{{ strftime_now(fmt) }}", "{% set now = strftime_now %}{{ now('%Y') }}"]
)
def test_a_date_that_cannot_be_frozen_is_refused_with_the_fix(template: str) -> None:
    with pytest.raises(ModelError, match=r"today's date.*Edit tokenizer\.chat_template"):
        freeze_date(template)


@pytest.mark.parametrize(
    ("piece", "says"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "loops"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ '' ~ 10**9999 }}", "ValueError"),
        ("{% include 'x' %}", "TypeError: no loader"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ '\\ud800' }}", "UnicodeEncodeError"),
        ("(" * 300, None),
    ],
)
def test_a_template_that_never_ends_or_fails_is_one_clear_error(monkeypatch, piece, says) -> None:
    monkeypatch.setattr("hafrm.data.chat_template.PROBE_SECONDS", 0.2)
    tokenizer = chat_tokenizer(CHATML + (piece if says else f"{{{{ {piece} }}}}"))
    for close in (True, False):
        with pytest.raises((ModelError, EndlessTemplateError), match=says):
            prepare_tokenizer(tokenizer, close=close)


def test_a_time_limit_ends_a_loop_in_any_thread() -> None:
    def loop() -> None:
        with time_limit(0.1):
            while True:
                pass

    with ThreadPoolExecutor(1) as threads, pytest.raises(EndlessTemplateError, match="not end"):
        threads.submit(loop).result(timeout=20)
    with time_limit(0.01):
        pass
    time.sleep(0.05)  # a block that ended in time is left alone


def test_the_plain_template_writes_turns_as_text_with_the_eos_after_each_answer() -> None:
    tokenizer = prepare_tokenizer(plain_tokenizer(), close=True)
    talk = [turn._asdict() for turn in (SYSTEM, USER, ANSWER, USER, ANSWER)]
    assert tokenizer.apply_chat_template(talk, tokenize=False) == (
        "System: You are a helpful assistant.\n\nUser:   How do I bake bread?\n\n\n"
        "Assistant: Mix flour, water and salt. <|endoftext|>\n\nUser:   How do I bake bread?\n\n\n"
        "Assistant: Mix flour, water and salt. <|endoftext|>"
    )
    prompt = tokenizer.apply_chat_template(talk[1:2], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("bread?\n\n\nAssistant:")


def test_preparing_leaves_the_tokenizer_given_alone() -> None:
    tokenizer = llama_like_tokenizer()
    own = prepare_tokenizer(tokenizer, close=True)
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert own("a").input_ids == own("a", add_special_tokens=False).input_ids
    assert own.apply_chat_template([USER._asdict(), ANSWER._asdict()], tokenize=False).startswith(
        "<s>User:"
    )
    assert tokenizer.chat_template is None
    assert tokenizer.pad_token is None
    assert len(own) == len(tokenizer)


def test_a_pad_that_equals_the_eos_is_replaced_by_one_from_the_vocabulary() -> None:
    """One that no template writes; a pad of its own stays."""
    own = prepare_tokenizer(chat_tokenizer(pad_token="<|im_end|>"), close=True)
    assert own.pad_token == "<|pad|>"
    assert prepare_tokenizer(llama_like_tokenizer(), close=True).pad_token == "<unk>"
    own = prepare_tokenizer(chat_tokenizer(pad_token="<|begin|>"), close=True)
    assert own.pad_token == "<|begin|>"
    assert choose_pad(chat_tokenizer(pad_token=None), "a <|pad|> b") == "<|endoftext|>"


def damaged():
    """One that tokenizers cannot write and read again."""

    def fail(_: dict) -> None:
        raise Exception("Token `x` out of vocabulary")

    tokenizer = chat_tokenizer()
    tokenizer.__deepcopy__ = fail
    return tokenizer


def several_templates():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    return tokenizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (several_templates, "several templates"),
        (lambda: chat_tokenizer(eos_token=None), r"no EOS token.*Set tokenizer\.eos_token"),
        (lambda: plain_tokenizer(pad=False), "no pad token other than its EOS.*add_special_tokens"),
        (ByT5Tokenizer, r"fast tokenizer.*ByT5Tokenizer"),
        (damaged, "The tokenizer is damaged: Token `x`"),
    ],
    ids=["no default", "no EOS", "nothing can serve as pad", "slow", "damaged"],
)
def test_a_tokenizer_that_cannot_be_prepared_is_refused_with_the_fix(make, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        prepare_tokenizer(make(), close=True)
    with pytest.raises(
        ModelError, match="no chat template"
    ):  # other people's reward models need one
        prepare_tokenizer(plain_tokenizer(), close=False)


def test_a_tokenizer_that_splits_special_tokens_or_pads_is_cured_of_it() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.split_special_tokens = True
    tokenizer.backend_tokenizer.encode_special_tokens = True
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.backend_tokenizer.enable_truncation(3)
    own = prepare_tokenizer(tokenizer, close=True)
    ids = own.backend_tokenizer.encode("a<|im_end|>b<|sep|>").ids
    assert len(ids) == 4
    assert ids[1::2] == own.convert_tokens_to_ids(["<|im_end|>", "<|sep|>"])
    assert own("a<|im_end|>b<|sep|>").input_ids == ids


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("paper-phi-2", "Instruct: How?\nOutput: So.<|im_end|>"),
        ("paper-mistral", "[INST] How? [/INST]So.<|im_end|>"),
    ],
)
def test_the_papers_templates_write_what_its_code_trains_on(name: str, text: str) -> None:
    """The text of its collator for a question and an answer, with the EOS and without a BOS."""
    encoder = Encoder(chat_tokenizer(read_template(name)))
    turns = [Message("user", "How?"), Message("assistant", "So.")]
    assert render(encoder.tokenizer, encoder.template, [turns]) == [text]
    assert encoder.template == PAPER_TEMPLATES[name]  # it ends at the EOS as it is
    talk = (Message("user", "a b"), Message("assistant", "c"), Message("user", "d e"))
    groups = [Group("g", talk, ("f g", "h")), Group("h", talk[:1], ("so it is", "no"))]
    assert encoder.encode(groups)[1].seam_merges == 0


def test_a_template_may_come_from_a_file_and_an_unknown_one_tells_the_known(tmp_path) -> None:
    (tmp_path / "own.jinja").write_text(CHATML)
    assert read_template(str(tmp_path / "own.jinja")) == CHATML
    with pytest.raises(
        ConfigError, match=r"'phi-2', which is neither paper-phi-2 nor paper-mistral"
    ):
        read_template("phi-2")
