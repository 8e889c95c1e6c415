"""Tiny tokenizers, built in memory, of the kinds that models come with, and templates in their manner.

Each call gives a new tokenizer object; what it costs (training a BPE on a few lines) is paid once.
"""

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_CORPUS = [
    "User: How do I bake bread at home?\n\nAssistant: Mix flour, water, salt and yeast, then wait.",
    "User: Tell me a story about the sea.\n\nAssistant: Once upon a time there was a little boat.",
    "system\nYou are a helpful assistant.\n\nuser\nWhat is the answer?\nassistant\nThe answer is 42.",
    "I think that it is a good idea to ask the question again. Thank you, and have a nice day!\n\n",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
] * 4

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Shaped like Llama 3: BOS, headers, trimmed contents, ends in its EOS.
LLAMA3_LIKE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '<|sep|>\n\n' + m['content'] | trim + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|sep|>\n\n' }}{% endif %}"
)
# Shaped like Gemma: no system turn, another name for the assistant, an ending without the EOS.
GEMMA_LIKE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<|im_start|>' + role + '\n' + m['content'] | trim + '<|sep|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
# Shaped like Mistral: brackets, a blank before the response, the EOS after it.
MISTRAL_LIKE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'] + eos_token }}{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
    "{% endfor %}"
)
# Shaped like Qwen3: takes reasoning apart in the last turn, and thinks in the generation prompt only.
QWEN3_LIKE = (
    "{%- for m in messages %}\n"
    "    {%- set content = m['content'] %}\n"
    "    {%- if m['role'] == 'assistant' and loop.last %}\n"
    "        {%- set thought = '' %}\n"
    "        {%- if '</think>' in content %}\n"
    "            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}\n"
    "            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n"
    "        {%- endif %}\n"
    "        {%- set content = '<think>\\n' + thought + '\\n</think>\\n\\n' + content %}\n"
    "    {%- endif %}\n"
    "    {{- '<|im_start|>' + m['role'] + '\\n' + content + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n<think>\\n' }}\n"
    "{%- endif %}\n"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3-like": LLAMA3_LIKE,
    "gemma-like": GEMMA_LIKE,
    "mistral-like": MISTRAL_LIKE,
    "qwen3-like": QWEN3_LIKE,
}


def chat_tokenizer(template: str | None = CHATML, **named: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with chat tokens; EOS `<|im_end|>`, BOS and pad of its own; adds nothing by itself.

    `<think>` and `</think>` are added tokens that are not special, as in Qwen3.
    """
    tokens = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"} | named
    tokenizer = Tokenizer.from_str(_byte_level(_CHAT_SPECIALS, ("<think>", "</think>")))
    named = {name: token for name, token in tokens.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)


def llama_like_tokenizer() -> PreTrainedTokenizerFast:
    """Like sentencepiece: writes a blank before a text, adds BOS by itself; no template, no pad."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_metaspace()), **tokens)


def plain_tokenizer(*, pad: bool = True) -> PreTrainedTokenizerFast:
    """Shaped like Phi-2: byte-level, one special token for everything, runs of blanks, no template."""
    end = "<|endoftext|>"
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    named |= {"pad_token": "<|pad|>"} if pad else {}
    tokenizer = Tokenizer.from_str(
        _byte_level(tuple(dict.fromkeys(named.values())), ("    ", "  "))
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


_CHAT_SPECIALS = (
    *("<|endoftext|>", "<|begin|>", "<|im_start|>", "<|im_end|>", "<|sep|>", "<|pad|>"),
    *("[INST]", "[/INST]"),
)


@cache
def _byte_level(specials: tuple[str, ...], ordinary: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in ordinary])
    return str(tokenizer.to_str())


@cache
def _metaspace() -> str:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(
        256
    ):  # byte fallback needs a piece for every byte, which training does not give
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    return json.dumps(state)
