"""Scripts outside the package (benchmarks/, examples/) as modules, as their reader would run them."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load_script(name: str):
    """The module of a file below the repository's root, without `.py`; it may import its neighbours."""
    file = ROOT / f"{name}.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses look their module up
    sys.path.insert(0, str(file.parent))
    spec.loader.exec_module(module)
    sys.path.remove(str(file.parent))
    return module
