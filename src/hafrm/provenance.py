"""What computed a result: versions, command line, platform and commit of this very process.

It is meant to be published beside the result, so neither the host's name nor the home directory is
in it. No package is imported to learn its version.
"""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = (
    *("hafrm", "torch", "transformers", "tokenizers", "peft", "datasets", "accelerate"),
    *("safetensors", "numpy", "scipy", "pydantic"),
)
"""The packages whose versions decide what a run computes."""


def describe_process() -> dict[str, Any]:
    """When, where and with what this process runs, as JSON has it."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command_line(),
        "git": _git_state(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _command_line() -> str:
    """The command as typed, with the home directory as `~`: a run folder may be published."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    home = os.path.expanduser("~")
    return command if home in {"~", "/"} else command.replace(home + "/", "~/")


def _git_state() -> dict[str, Any] | None:
    """Commit of the current directory and whether files differ from it; None outside git."""
    git = shutil.which("git")
    if git is None:
        return None
    answers = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run([git, *command], capture_output=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        answers.append(done.stdout.decode("utf-8", "replace").strip())
    return {"commit": answers[0], "changed": bool(answers[1])}
