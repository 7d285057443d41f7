"""Names to folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from gale.core.errors import ModelError
from gale.registry.models import BUILTIN, resolve_model


def test_no_name_means_the_built_in_model() -> None:
    assert resolve_model(None) == resolve_model("gale-0") == BUILTIN


def test_a_folder_is_found_by_path_and_a_model_by_name(home: Path) -> None:
    (home / "models" / "mine").mkdir(parents=True)
    assert resolve_model("mine") == home / "models" / "mine"
    assert resolve_model(str(home / "models")) == home / "models"


@pytest.mark.parametrize("name", ["nothing", "../models/mine", "/no/such/folder"])
def test_what_is_not_there_is_said_with_what_is(home: Path, name: str) -> None:
    (home / "models" / "mine").mkdir(parents=True)
    with pytest.raises(ModelError, match="no model folder") as error:
        resolve_model(name)
    assert "gale-0, mine" in str(error.value.hint)
