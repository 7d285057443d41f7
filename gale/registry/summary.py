"""What a model is, told from its folder without loading it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from gale.core.errors import ModelError
from gale.model.checkpoint import check_weights, load_tokenizer, stored_dtype
from gale.model.config import ModelConfig
from gale.registry.transfer import model_files

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# The first line of that name in a model card's front matter.
_LICENCE = re.compile(r"\A---\n(?:(?!---\n).*\n)*?licen[sc]e:(.+)\n")


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A model folder at a glance; ``active_parameters`` compute one token, ``size`` is in bytes."""

    folder: Path
    config: ModelConfig
    parameters: int
    active_parameters: int
    dtype: str
    tokens: int
    licence: str | None
    size: int

    @classmethod
    def of(cls, folder: Path) -> ModelSummary:
        """Reads the heads of the weights only. Raises :class:`ModelError` for a folder that cannot be opened."""
        config = ModelConfig.load(folder)
        parameters = sum(map(math.prod, check_weights(folder, config).values()))
        return cls(
            folder=folder,
            config=config,
            parameters=parameters,
            active_parameters=parameters - config.body_parameters + config.active_body_parameters,
            dtype=_DTYPES[stored_dtype(folder)],
            tokens=load_tokenizer(folder, config).vocabulary_size,
            licence=_licence(folder),
            size=sum(file.stat().st_size for file in model_files(folder)),
        )

    def lines(self) -> list[tuple[str, str]]:
        """Names and values for people."""
        config = self.config
        shape = f"{config.layers} layers of {config.hidden_size}, {config.heads} heads on {config.kv_heads} key heads"
        lines = [("folder", str(self.folder)), ("architecture", config.family), ("shape", shape)]
        if config.experts is not None:
            layers = sum(map(config.has_experts, range(config.layers)))
            chosen = f"{config.experts.per_token} of {config.experts.count} a token"
            lines.append(("experts", f"{chosen}, {config.experts.intermediate_size} wide, in {layers} layers"))
        counted = f"{self.parameters:,}"
        if self.active_parameters != self.parameters:
            counted += f", of which {self.active_parameters:,} compute a token"
        return [
            *lines,
            ("parameters", counted),
            ("embeddings", "tied to the head" if config.tied_embeddings else "apart from the head"),
            ("context", f"{config.context_length:,} tokens"),
            ("vocabulary", f"{self.tokens:,} tokens"),
            ("numbers", self.dtype),
            ("licence", self.licence or "not said in a README.md"),
            ("size", f"{self.size / 1e6:,.1f} MB"),
        ]


def _licence(folder: Path) -> str | None:
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'README.md'} cannot be read: {error}") from error
    found = _LICENCE.match(card.replace("\r\n", "\n"))
    return found[1].strip() if found else None
