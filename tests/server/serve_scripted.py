"""``gale serve`` itself, with the scripted engine in the model's place. Run as a program by test_serve."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import typer

from gale.cli.serve import serve
from gale.core.errors import GaleError
from gale.core.logging import configure_logging
from tests.server.scripted_engine import ScriptedEngine


class LocalEngine:
    @staticmethod
    def load(path: Path, options: object = None, *, weights: str = "bf16", draft: Path | None = None) -> ScriptedEngine:
        return ScriptedEngine()


engine, registry = ModuleType("gale.engine.local"), ModuleType("gale.registry.models")
engine.LocalEngine = LocalEngine  # type: ignore[attr-defined]
registry.resolve_model = lambda name: Path(name or "builtin")  # type: ignore[attr-defined]
sys.modules.update({"gale.engine.local": engine, "gale.registry.models": registry})

configure_logging()
try:
    typer.run(serve)
except GaleError as error:
    print(f"{error.message} {error.hint}", file=sys.stderr)
    sys.exit(error.exit_code)
