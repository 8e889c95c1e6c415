"""Where results lie that cost time and can be computed again: under names that say what they depend on."""

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """$HAFRM_CACHE/kind, or hafrm/kind under the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("HAFRM_CACHE", home / "hafrm")) / kind
