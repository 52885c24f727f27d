"""A server that confines blocks, and the ways a block can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

GPT2 = "openai-community/gpt2"


@pytest.fixture(scope="session")
def confining_server(start_server: Callable[..., Any]) -> Any:
    return start_server(GPT2)


@pytest.fixture
def server(confining_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The settings for a server of GPT-2."""
    from nnsight import CONFIG

    monkeypatch.setattr(CONFIG.API, "HOST", confining_server.host)
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    confining_server.wait_for(GPT2)
    return confining_server


@pytest.fixture(params=["local", "trusted", "confined"])
def where(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The options of a trace that say where its block runs."""
    if request.param == "confined":
        request.getfixturevalue("server")
        return {"remote": True}
    return {"backend": "local-process"} if request.param == "trusted" else {}


@pytest.fixture(scope="session")
def away(gpt2: Any) -> Any:
    """A model object that must never load its weights."""
    from nnsight import LanguageModel

    return LanguageModel(GPT2)


@pytest.fixture
def model(where: dict[str, Any], gpt2: Any, away: Any) -> Any:
    return away if where else gpt2
