"""The checklist itself, and `verify_directory`, which judges a directory by it."""

from pathlib import Path

from hafrm.scoring.checklist import on_files, on_scores, on_text
from hafrm.scoring.checklist.clause import Clause, Verification, judge
from hafrm.scoring.checklist.subject import TOLERANCE, Subject

_LOADS = (
    "sequence classifier",
    "one label",
    "stock code",
    "safetensors only",
    "not quantised",
    "head without bias",
)
_SCORES = ("no fresh weights", "chat template", "ids have embeddings", "finite scores")

CLAUSES = (
    Clause(
        "sequence classifier",
        on_files.architecture,
        "save it by AutoModelForSequenceClassification, or re-export it (hafrm export)",
    ),
    Clause(
        "one label",
        on_files.one_label,
        'write "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0} into config.json',
        needs=("sequence classifier",),
    ),
    Clause(
        "raw reward",
        on_files.raw_reward,
        'write "problem_type": "regression" into config.json',
        needs=("sequence classifier",),
    ),
    Clause(
        "stock code",
        on_files.stock_code,
        "remove auto_map and the Python files; the class must be one that transformers has",
    ),
    Clause(
        "safetensors only",
        on_files.safetensors_only,
        "save the weights with safetensors and delete the pickles",
    ),
    Clause(
        "not quantised",
        on_files.not_quantised,
        "remove quantization_config from config.json, once the weights are whole",
    ),
    Clause(
        "head without bias",
        on_files.head_without_bias,
        "keep one row score.weight; a bias moves all rewards alike, so it can be dropped; after LoRA, "
        'train with modules_to_save=["score"] and merge',
        needs=("sequence classifier", "safetensors only"),
    ),
    Clause(
        "dtype stated",
        on_files.dtype_stated,
        'write the weights\' own "dtype" into config.json',
        needs=("safetensors only",),
    ),
    Clause(
        "rotary settings",
        on_files.rotary_keys,
        "write rope_theta (rope_scaling, partial_rotary_factor) into config.json beside rope_parameters",
    ),
    Clause(
        "no fresh weights",
        on_files.no_fresh_weights,
        "export again from the trained model: a copy or merge has lost weights",
        needs=_LOADS,
        runs_model=True,
    ),
    Clause(
        "nothing left over",
        on_files.nothing_left_over,
        "save the classifier's own weights only; the LM head belongs into a directory of its own",
        needs=("no fresh weights",),
        runs_model=True,
    ),
    Clause(
        "chat template",
        on_text.chat_template,
        "set tokenizer.chat_template to the format that was trained on, and save the tokenizer here",
    ),
    Clause(
        "no date in the template",
        on_text.no_date,
        "replace strftime_now(...) in the template by a fixed date",
        needs=("chat template",),
    ),
    Clause(
        "pad is not EOS",
        on_text.pad_is_not_eos,
        "choose an unused token as pad, in the tokenizer and as pad_token_id in config.json",
        needs=("chat template",),
    ),
    Clause(
        "ids have embeddings",
        on_text.ids_have_embeddings,
        "save the tokenizer that the model was trained with, or resize the embeddings",
        needs=("chat template",),
    ),
    Clause(
        "BOS once",
        on_text.bos_once,
        'write "add_bos_token": false, "add_eos_token": false into tokenizer_config.json, or take the BOS '
        "out of the tokenizer's post-processor",
        needs=("chat template",),
    ),
    Clause(
        "ends in EOS",
        on_text.ends_in_eos,
        "make the template end an assistant's last turn at the EOS, with nothing behind it",
        needs=("chat template",),
    ),
    Clause(
        "inputs fit",
        on_files.inputs_fit,
        'write "model_input_names": ["input_ids", "attention_mask"] into tokenizer_config.json',
        needs=("no fresh weights", "chat template"),
        runs_model=True,
    ),
    Clause(
        "finite scores",
        on_scores.finite,
        "look for weights that are not finite; if the dtype is float16, export bf16 or fp32",
        needs=("no fresh weights", "chat template", "ids have embeddings"),
        runs_model=True,
    ),
    Clause(
        "last token",
        on_scores.last_token,
        "the class pools elsewhere than at the last token: use a stock decoder classifier",
        needs=(*_SCORES, "pad is not EOS"),
        runs_model=True,
    ),
    Clause(
        "left = right padding",
        on_scores.same_on_both_sides,
        "the model's attention looks at pads: pad on the right only, or use another attention",
        needs=(*_SCORES, "pad is not EOS"),
        runs_model=True,
    ),
    Clause(
        "batch 1 = batch N",
        on_scores.same_in_a_batch,
        "find what depends on the batch (normalisation, dropout, a kernel); score one at a time until then",
        needs=(*_SCORES, "pad is not EOS"),
        runs_model=True,
    ),
    Clause(
        "golden scores",
        on_scores.golden_scores,
        "weights, tokenizer or template are not those that were exported; export again",
        needs=(*_SCORES, "last token", "BOS once", "ends in EOS", "no date in the template"),
        runs_model=True,
    ),
)
"""In the order in which they are judged: what a clause needs stands before it."""


def verify_directory(
    path: Path,
    golden: Path | None = None,
    *,
    tolerance: float = TOLERANCE,
    run_model: bool = True,
) -> Verification:
    """Judge a reward directory, anybody's, by every clause; `run_model` False leaves the weights unread.

    Golden scores are replayed from `golden`, or from the directory's own file where there is one.
    Raises ModelError when there is no model, DataError for a damaged golden file.
    """
    clauses = [clause for clause in CLAUSES if run_model or not clause.runs_model]
    return judge(Subject(path, golden, tolerance), clauses)
