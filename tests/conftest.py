"""For all tests: one thread (the models are tiny, two test processes share two cores), no hub, no
progress bars, and a reference cache of their own. Tests marked `cuda` are skipped without a GPU."""

import gc
import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

CUDA_TESTS_ON = os.environ.get("HAFRM_CUDA_TESTS_ON", "cuda")
"""`cpu` runs the tests marked `cuda` on a CPU: it shows that their code runs, and nothing about a GPU.
`any` takes the CPU where there is no GPU."""

# The shape checks cost at every import and call: they are for the modules that state shapes.
SRC = Path(__file__).parents[1] / "src"
SHAPED = (f for f in SRC.rglob("*.py") if "from jaxtyping import" in f.read_text(encoding="utf-8"))
install_import_hook(
    [".".join(f.relative_to(SRC).with_suffix("").parts) for f in SHAPED], "beartype.beartype"
)
# Imports make a million objects that stay: no collection looks at them, now or in a test.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if not marked:
        return
    import torch

    if CUDA_TESTS_ON == "cuda" and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def device():
    """Where a test marked `cuda` runs."""
    import torch

    on_cpu = CUDA_TESTS_ON == "any" and not torch.cuda.is_available()
    return torch.device("cpu" if on_cpu else CUDA_TESTS_ON.replace("any", "cuda"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A tiny model's `reward`, with five golden scores, and `policy`; copy what a test changes."""
    from support.exports import GOLDEN_GROUP, export_both, record_golden

    folder = tmp_path_factory.mktemp("exported")
    export_both(folder)
    assert record_golden(folder / "reward", GOLDEN_GROUP) == 5
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAFRM_CACHE", str(tmp_path_factory.getbasetemp() / "hafrm-cache"))


@pytest.fixture(autouse=True, scope="module")
def _spare_the_garbage_collector() -> None:
    """What is imported stays: `gc.collect`, by which hafrm frees memory, need not look at it each time."""
    gc.freeze()
