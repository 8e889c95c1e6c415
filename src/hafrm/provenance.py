"""What computed a result: versions, command line, platform and commit of this very process.

It is meant to be published beside the result: without the host's name and the home directory.
"""

import contextlib
import importlib.metadata
import os
import platform
import shlex
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
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    home = os.path.expanduser("~")
    return command if home in {"~", "/"} else command.replace(home + "/", "~/")


def _git_state() -> dict[str, Any] | None:
    answers = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *command], capture_output=True, timeout=20, check=True)  # noqa: S607
        except (OSError, subprocess.SubprocessError):  # no git, or outside a repository
            return None
        answers.append(done.stdout.decode("utf-8", "replace").strip())
    return {"commit": answers[0], "changed": bool(answers[1])}
