"""For all tests: one thread (the models are tiny, two test processes share two cores), no hub, no
progress bars, and a reference cache of their own."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAFRM_CACHE", str(tmp_path_factory.getbasetemp() / "hafrm-cache"))
