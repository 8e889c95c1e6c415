"""The golden file: conversations with the reward that every consumer of an export must get.

One JSON object per line: `messages` or `text`, `reward`, and optionally `input_ids`. Nothing here loads
torch, so a machine without it can verify a server.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError, model_validator

from hafrm.errors import DataError

GOLDEN = "golden_scores.jsonl"
"""The file's name in an exported directory."""


class GoldenLine(BaseModel):
    """One conversation and its reward."""

    model_config = ConfigDict(frozen=True)

    reward: FiniteFloat
    messages: tuple[dict[str, str], ...] = ()
    text: str | None = None  # the conversation, rendered with the exported template
    input_ids: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _has_conversation(self) -> "GoldenLine":
        has_turns = all({"role", "content"} <= message.keys() for message in self.messages)
        if not has_turns or (not self.messages and self.text is None):
            raise ValueError("needs `messages` (role and content each) or `text`")
        return self


def read_golden(path: Path) -> list[GoldenLine]:
    """The lines of a golden file, or of the one in a directory; DataError for a damaged one."""
    file = path / GOLDEN if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read golden scores from {file}: {error}") from error
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            lines += [GoldenLine.model_validate_json(line)] if line.strip() else []
        except ValidationError as error:
            what = error.errors()[0]
            raise DataError(f"{file}, line {number}: {what['loc']} {what['msg']}") from error
    if not lines:
        raise DataError(f"{file} holds no golden scores; `hafrm export` writes some")
    return lines
