"""``gale data prepare``: sources -> documents -> clean -> deduplicate -> tokens -> shards with a manifest."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gale.core import files
from gale.core.errors import DataError
from gale.core.progress import Bar
from gale.core.recipe import load_recipe
from gale.data.cache import is_recipe, made_once
from gale.data.clean import ExactDeduplicator, clean_documents, fingerprint
from gale.data.recipe import DataRecipe
from gale.data.shards import MANIFEST, ShardWriter
from gale.data.shards import fingerprint as shards_fingerprint
from gale.data.sources import Document
from gale.data.tokenizer_training import ready_tokenizer
from gale.text.template import ChatTemplate
from gale.text.tokenizer import END_OF_TEXT, Tokenizer

_BATCH = 512


def prepare(recipe: DataRecipe, out: Path) -> dict[str, Any]:
    """Write the shards to ``out`` (which appears only when all is done) and return the manifest.

    Raises :class:`DataError` for sources that are missing, damaged or leave a split empty.
    """
    tokenizer_folder = ready_tokenizer(recipe.tokenizer)
    tokenizer = Tokenizer.load(tokenizer_folder)
    encoder = DocumentEncoder(tokenizer)
    missing = [str(source.path) for source in recipe.sources if not source.path.is_file()]
    if missing:
        raise DataError(f"These data files do not exist: {', '.join(missing)}", hint="Check the paths in the recipe.")
    # Held-out splits come first, so that a document in both is dropped from training, not from the evaluation.
    sources = sorted(recipe.sources, key=lambda source: source.split == "train")
    paired = {source.split for source in sources if source.format == "preference"}
    seen = ExactDeduplicator()
    writers: dict[str, ShardWriter] = {}
    text_bytes: Counter[str] = Counter()
    reports: list[dict[str, Any]] = []
    with files.new_directory(out, marker=MANIFEST) as folder, Bar("Preparing", len(sources)) as bar:
        for source in sources:
            writer = writers.setdefault(
                source.split,
                ShardWriter(
                    folder, source.split, vocabulary_size=tokenizer.vocabulary_size, shard_tokens=recipe.shard_tokens
                ),
            )
            counts = Counter(dict.fromkeys(("read", "empty", "duplicates", "documents", "tokens", "trained_tokens"), 0))
            cleaned = clean_documents(source, replace=recipe.replace, seed=recipe.seed, counts=counts)
            documents = _select(_unique(cleaned, seen, counts), source.epochs, counts)
            for batch in _batched(documents):
                for (ids, trained), document in zip(encoder.encode(batch), batch, strict=True):
                    writer.add(ids, trained)
                    counts["tokens"] += len(ids)
                    counts["trained_tokens"] += sum(trained)
                    text_bytes[source.split] += document_bytes(document)
            reports.append(
                {
                    "file": source.path.name,
                    "sha256": files.sha256(source.path),
                    "licence": source.licence,
                    "origin": source.origin,
                    "split": source.split,
                    "epochs": source.epochs,
                    **counts,
                }
            )
            bar.advance(f"{source.path.name}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")
        for name, writer in writers.items():
            writer.close()
            if not writer.tokens:
                raise DataError(f"Nothing is left for the split {name!r}.", hint="Its sources are empty or duplicates.")
        manifest: dict[str, Any] = {
            "format": 1,
            "fingerprint": shards_fingerprint(folder),
            "tokenizer_sha256": files.sha256(tokenizer_folder / "tokenizer.json"),
            "vocabulary_size": tokenizer.vocabulary_size,
            "splits": {
                name: {
                    "documents": writer.documents,
                    "tokens": writer.tokens,
                    "bytes": text_bytes[name],
                    "shards": writer.shards,
                    **({"pairs": True} if name in paired else {}),
                }
                for name, writer in writers.items()
            },
            "sources": reports,
            "recipe": recipe.model_dump(mode="json"),
        }
        tokenizer.save(folder / "tokenizer")
        files.write_json(folder / MANIFEST, manifest)
    return manifest


def ready_data(path: Path) -> Path:
    """The folder of prepared data that ``path`` is, or that the data recipe ``path`` makes."""
    if not is_recipe(path):
        return path
    recipe = load_recipe(path, DataRecipe)
    recipe = recipe.model_copy(update={"tokenizer": ready_tokenizer(recipe.tokenizer)})
    return made_once(recipe, prepare, kind="data", marker=MANIFEST)


class DocumentEncoder:
    """Documents to token ids with the mask of what is trained.

    Running text stands between two end-of-text tokens: the first gives its first word something to follow, the
    last teaches the model to stop. A conversation is rendered by the chat template, which also says what the
    assistant wrote.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.chat_template is None or (end := tokenizer.token_id(END_OF_TEXT)) is None:
            raise DataError("The tokenizer has no chat template or no end-of-text token.", hint="Train one with Gale.")
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer.chat_template, tokenizer)
        self._end = end

    def encode(self, documents: list[Document]) -> Iterator[tuple[list[int], list[bool]]]:
        """Ids and trained flags of each document, in order."""
        texts = iter(self._tokenizer.encode_batch([d.text for d in documents if d.text is not None]))
        for document in documents:
            if document.text is not None:
                ids = [self._end, *next(texts), self._end]
                yield ids, [True] * len(ids)
            else:
                chat = self._template.encode(document.messages)
                if not any(chat.trained):
                    raise DataError(
                        "The tokenizer's chat template does not mark what the assistant writes.",
                        hint="Put {% generation %} and {% endgeneration %} round it.",
                    )
                yield chat.ids, _last_answer(chat.trained) if document.last_only else chat.trained


def _last_answer(trained: list[bool]) -> list[bool]:
    """The last unbroken stretch of what is trained: the template leaves something between any two answers."""
    end = max(index for index, flag in enumerate(trained) if flag) + 1
    start = max((index + 1 for index in range(end) if not trained[index]), default=0)
    return [start <= index < end for index in range(len(trained))]


def document_bytes(document: Document) -> int:
    """UTF-8 size of a document's text, without anything the template adds."""
    return sum(
        len(part.encode("utf-8", "surrogatepass"))
        for part in (document.text or "", *(message["content"] for message in document.messages))
    )


def _unique(documents: Iterable[Document], seen: ExactDeduplicator, counts: Counter[str]) -> Iterator[Document]:
    for document in documents:
        if seen.is_new(document):
            yield document
        else:
            counts["duplicates"] += 1


def _select(documents: Iterable[Document], epochs: float, counts: Counter[str]) -> Iterator[Document]:
    """Each document floor(epochs) times, and once more where its hash falls into the remaining fraction."""
    whole, fraction = math.floor(epochs), epochs - math.floor(epochs)
    for document in documents:
        chance = int.from_bytes(fingerprint(document)[:8], "big") / 2**64
        for _ in range(whole + (chance < fraction)):
            for half in document.halves():  # a preference becomes two documents, side by side
                counts["documents"] += 1
                yield half


def _batched(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(itertools.islice(documents, _BATCH)):
        yield batch
