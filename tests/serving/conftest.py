"""One tiny model with both heads behind the app, in this process."""

import json
import shutil

import pytest
from starlette.testclient import TestClient

from hafrm.scoring.reward_model import IMPLICIT_RULE, RewardModel
from hafrm.serving.backends import LocalBackend
from hafrm.serving.reward_app import RewardServer
from support.reward_servers import until_ready


@pytest.fixture(scope="session")
def run(exported, tmp_path_factory):
    """A run with both heads and golden scores."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(exported, folder / "model")
    rule = json.dumps({"reference": None, "beta": 0.1, "per_token": False})
    (folder / "model" / "policy" / IMPLICIT_RULE).write_text(rule)
    return folder


@pytest.fixture(scope="session")
def rm(run):
    return RewardModel.from_pretrained(run)


@pytest.fixture(scope="session")
def server(run):
    return RewardServer(LocalBackend(run), "run")


@pytest.fixture(scope="module")
def client(server):
    with TestClient(server.app) as client:
        yield until_ready(client)
