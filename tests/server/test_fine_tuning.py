"""Fine-tuning jobs through the official client: they really train, are served at once, and survive what kills them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from sqlalchemy import Connection, select

from gale.core.settings import settings
from gale.engine.local import LocalEngine
from gale.model.checkpoint import load_model
from gale.platform import tables, tuning_supervisor
from gale.platform.access import LOCAL_OWNER, NotAllowedError
from gale.platform.budgets import BudgetKey, read_budgets, set_budget
from gale.platform.clock import now_us
from gale.platform.errors import NotFoundError
from gale.platform.prices import Price, set_price
from gale.platform.store import Store
from gale.text.tokenizer import Tokenizer
from tests.server.live import Live, start
from tests.tiny_data import GRADER
from tests.tiny_model import save_folder
from tests.train.runs import metrics

QUESTION = "Where does the river go?"
ROWS = [
    {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": f"It goes to sea {number}."}]}
    for number in range(12)
]
FEW = {"n_epochs": 2, "batch_size": 4}
LONG = {"n_epochs": 50, "batch_size": 1}


def reinforcement(knobs: dict[str, Any]) -> dict[str, Any]:
    return {"type": "reinforcement", "reinforcement": {"grader": GRADER, "hyperparameters": knobs}}


@pytest.fixture(scope="module")
def base(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tokenizer, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def own_store(gale_home: Path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{gale_home / 'gale.db'}")
    yield opened
    opened.close()


@pytest.fixture
def server(own_store: Store, base: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    monkeypatch.setattr(tuning_supervisor, "LEASE_S", 4.0)
    engine = LocalEngine(load_model(base, dtype=torch.float32), tokenizer, model_id="tiny", folder=base)
    live = start(own_store, engine=engine)
    yield live
    live.stop()
    asyncio.run(engine.close())


def client_of(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="anything at all", max_retries=0)


@pytest.fixture
def client(server: Live) -> OpenAI:
    return client_of(server.url)


def upload(client: OpenAI, rows: list[Any]) -> str:
    content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return client.files.create(file=("rows.jsonl", io.BytesIO(content.encode())), purpose="fine-tune").id


def create(client: OpenAI, rows: list[Any] = ROWS, knobs: dict[str, Any] = FEW, **more: Any) -> FineTuningJob:
    method = {"type": "supervised", "supervised": {"hyperparameters": knobs}}
    asked = {"model": "tiny", "training_file": upload(client, rows), "method": method, "seed": 5, **more}
    return client.fine_tuning.jobs.create(**asked)


def wait(client: OpenAI, job_id: str, until: Callable[[FineTuningJob], bool]) -> FineTuningJob:
    """The job when ``until`` holds; processes start slowly on a busy machine."""
    deadline = time.monotonic() + 300
    while not until(job := client.fine_tuning.jobs.retrieve(job_id)):
        assert time.monotonic() < deadline, f"it stays {job.status}"
        assert not ended(job), job.error
        time.sleep(0.1)
    return job


def ended(job: FineTuningJob) -> bool:
    return job.status in ("succeeded", "failed", "cancelled")


def may_spend(store: Store, limit_micro: int) -> None:
    """A token costs a micro-unit from now on, and the project has so many."""

    def work(connection: Connection) -> None:
        set_price(connection, "", Price(1_000_000, 1_000_000, 1_000_000))
        set_budget(connection, BudgetKey(("project", "proj_default"), "total"), limit_micro, now_us())

    asyncio.run(store.database.write(work))


def money_of(store: Store) -> tuple[int, int, list[int]]:
    """What is used and held of that, and what each job was charged."""

    def work(connection: Connection) -> tuple[int, int, list[int]]:
        (budget,) = read_budgets(connection, now_us())
        events = tables.usage_events.c
        query = select(events.cost_micro).where(events.kind == "fine_tuning").order_by(events.created_at)
        return budget.used_micro, budget.held_micro, list(connection.scalars(query))

    return asyncio.run(store.database.read(work))


def steps_of(client: OpenAI, job_id: str) -> list[int]:
    """The steps that were reported, in the order of reporting."""
    events = list(client.fine_tuning.jobs.list_events(job_id, limit=100))
    return [event.data["step"] for event in reversed(events) if event.type == "metrics"]  # type: ignore[index]


def child_of(home: Path, job_id: str) -> int | None:
    """The process of a job, by the lock that it holds."""
    lock = home / "jobs" / job_id / "job.lock"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(handle.resolve() == lock for handle in (process / "fd").iterdir()):
                return int(process.name)
    return None


def run_log(home: Path, job_id: str) -> list[dict[str, Any]]:
    return metrics(home / "jobs" / job_id / "run")


@pytest.mark.slow
def test_uploaded_rows_become_a_served_model(client: OpenAI, gale_home: Path) -> None:
    job = create(
        client,
        suffix="sea-1",
        validation_file=upload(client, ROWS[:3]),
        metadata={"team": "sea"},
        knobs={**FEW, "n_epochs": 6},
    )
    assert (job.status, job.fine_tuned_model, job.trained_tokens) == ("validating_files", None, None)
    with pytest.raises(openai.ConflictError):
        client.files.delete(job.training_file)
    job = wait(client, job.id, ended)
    assert (job.status, job.error, job.metadata) == ("succeeded", None, {"team": "sea"})
    name = job.fine_tuned_model
    assert name is not None and name.startswith("ft:tiny:default-organisation:sea-1:")
    assert job.trained_tokens and job.finished_at and job.hyperparameters.n_epochs == 6

    assert steps_of(client, job.id) == list(range(1, 19))
    events = list(client.fine_tuning.jobs.list_events(job.id))
    assert events[0].message == "The job has successfully completed"
    losses = [e.data["train_loss"] for e in reversed(events) if e.type == "metrics"]  # type: ignore[index]
    assert losses[-1] < losses[0] / 2
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [each.step_number for each in checkpoints] == [18, 16, 14]
    assert checkpoints[0].fine_tuned_model_checkpoint == name
    assert checkpoints[0].metrics.full_valid_loss is not None

    served = [model.id for model in client.models.list()]
    made = {each.fine_tuned_model_checkpoint for each in checkpoints}
    assert served[0] == "tiny" and set(served[1:]) == {*made, "gale-moderation"}

    def says(model: str) -> str | None:
        asked = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=12
        )
        return asked.choices[0].message.content

    assert "sea" in str(says(name)) and says(name) != says("tiny")
    card = (gale_home / "jobs" / job.id / "run" / "model" / "README.md").read_text()
    assert job.training_file in card and "base: tiny" in card

    # What it made can be trained on, and goes away for good when it is deleted.
    again = wait(client, create(client, model=name).id, ended)
    assert again.status == "succeeded" and again.model == name
    assert client.models.delete(name).deleted
    with pytest.raises(openai.NotFoundError):
        says(name)
    with pytest.raises(openai.NotFoundError):
        client.models.delete(name)
    with pytest.raises(openai.BadRequestError):
        client.models.delete("tiny")
    client.files.delete(job.training_file)


@pytest.mark.slow
def test_a_restarted_server_serves_what_was_made_before(
    client: OpenAI, server: Live, own_store: Store, base: Path, tokenizer: Tokenizer
) -> None:
    name = wait(client, create(client).id, ended).fine_tuned_model
    server.stop()
    engine = LocalEngine(load_model(base, dtype=torch.float32), tokenizer, model_id="tiny", folder=base)
    second = start(own_store, engine=engine)
    try:
        deadline = time.monotonic() + 20
        while name not in [model.id for model in client_of(second.url).models.list()]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        second.stop()
        asyncio.run(engine.close())


@pytest.mark.slow
def test_a_killed_process_goes_on_with_the_same_curve_and_reports_each_step_once(
    client: OpenAI, gale_home: Path
) -> None:
    knobs = {"n_epochs": 40, "batch_size": 4}
    whole = create(client, knobs=knobs)
    job = create(client, knobs=knobs)
    wait(client, whole.id, ended)
    for step in (20, 60):
        wait(client, job.id, lambda _, step=step: len(steps_of(client, job.id)) >= step)  # type: ignore[misc]
        process = child_of(gale_home, job.id)
        assert process is not None
        os.kill(process, signal.SIGKILL)
    job = wait(client, job.id, ended)
    assert job.status == "succeeded"
    assert steps_of(client, job.id) == list(range(1, 121))
    assert run_log(gale_home, job.id) == run_log(gale_home, whole.id)
    assert job.trained_tokens == client.fine_tuning.jobs.retrieve(whole.id).trained_tokens
    warnings = [e.message for e in client.fine_tuning.jobs.list_events(job.id) if e.level == "warn"]
    assert len(warnings) == 2 and "SIGKILL" in warnings[0]


@pytest.mark.slow
def test_a_killed_server_takes_its_jobs_up_again(base: Path, gale_home: Path) -> None:
    @contextlib.contextmanager
    def serving() -> Iterator[tuple[subprocess.Popen[str], OpenAI]]:
        arguments = ["serve", "--model", str(base), "--port", "0"]
        with subprocess.Popen(
            [sys.executable, "-m", "gale.cli", *arguments], stdout=subprocess.PIPE, text=True, env={**os.environ}
        ) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            yield process, client_of(line.split(" at ")[1].split(" - ")[0])
            process.kill()

    def money() -> tuple[int, int, list[int]]:
        with contextlib.closing(Store.open(f"sqlite:///{gale_home / 'gale.db'}")) as store:
            return money_of(store)

    with contextlib.closing(Store.open(f"sqlite:///{gale_home / 'gale.db'}")) as store:
        may_spend(store, 10**9)
    knobs = {"n_epochs": 40, "batch_size": 4}
    with serving() as (process, client):
        whole = wait(client, create(client, knobs=knobs).id, ended)
        job = create(client, knobs=knobs)
        wait(client, job.id, lambda _: len(steps_of(client, job.id)) >= 30)
        child = child_of(gale_home, job.id)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while child is not None and Path(f"/proc/{child}").exists():  # an orphan ends by itself
            assert time.monotonic() < deadline
            time.sleep(0.05)
    tokens = whole.trained_tokens
    assert money() == (tokens, tokens, [tokens])  # the killed one still holds what it may cost: as much
    with serving() as (process, client):
        job = wait(client, job.id, ended)
        assert job.status == "succeeded"
        assert steps_of(client, job.id) == list(range(1, 121))
        assert run_log(gale_home, job.id) == run_log(gale_home, whole.id)
        assert {job.fine_tuned_model, whole.fine_tuned_model} <= {model.id for model in client.models.list()}
    assert money() == (2 * job.trained_tokens, 0, [tokens, job.trained_tokens])  # type: ignore[operator]


@pytest.mark.slow
def test_a_job_holds_what_it_may_cost_and_pays_what_it_trained_once(
    client: OpenAI, own_store: Store, gale_home: Path
) -> None:
    may_spend(own_store, 10**9)
    job = create(client, knobs={"n_epochs": 40, "batch_size": 4})
    wait(client, job.id, lambda _: len(steps_of(client, job.id)) >= 20)
    used, most, charged = money_of(own_store)
    assert (used, charged) == (0, []) and most > 0
    os.kill(child_of(gale_home, job.id) or 0, signal.SIGKILL)
    spent = wait(client, job.id, ended).trained_tokens
    assert spent == most  # which is exact, as it ended with a whole epoch
    assert money_of(own_store) == (spent, 0, [spent])

    job = create(client, knobs=LONG)
    wait(client, job.id, lambda _: len(steps_of(client, job.id)) >= 3)
    cut = client.fine_tuning.jobs.cancel(job.id).trained_tokens
    assert cut and cut < most
    assert money_of(own_store) == (spent + cut, 0, [spent, cut])

    may_spend(own_store, spent + cut + 5)
    job = wait(client, create(client).id, lambda job: job.status == "failed")
    assert job.error is not None and job.error.code == "insufficient_quota"
    assert "budget of project proj_default has too little left for this job" in job.error.message
    may_spend(own_store, spent + cut)
    with pytest.raises(openai.RateLimitError) as caught:
        create(client)
    assert caught.value.code == "insufficient_quota"
    assert money_of(own_store) == (spent + cut, 0, [spent, cut])


@pytest.mark.slow
def test_cancel_and_pause_end_the_work_and_only_legal_moves_are_made(client: OpenAI, gale_home: Path) -> None:
    jobs = client.fine_tuning.jobs
    job = create(client, knobs=LONG)
    waiting = create(client, knobs=FEW)
    with pytest.raises(openai.ConflictError):
        jobs.resume(job.id)
    wait(client, job.id, lambda _: len(steps_of(client, job.id)) >= 3)
    assert jobs.pause(job.id).status == "paused"
    with pytest.raises(openai.ConflictError):
        jobs.pause(job.id)
    at_pause = steps_of(client, job.id)
    # A paused job leaves its place to the next.
    assert wait(client, waiting.id, ended).status == "succeeded"
    assert len(steps_of(client, job.id)) <= len(at_pause) + 1
    assert child_of(gale_home, job.id) is None
    assert jobs.resume(job.id).status == "queued"
    wait(client, job.id, lambda _: len(steps_of(client, job.id)) > len(at_pause) + 3)
    assert jobs.cancel(job.id).status == "cancelled"
    at_cancel = len(steps_of(client, job.id))
    for move in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(openai.ConflictError):
            move(job.id)
    deadline = time.monotonic() + 20
    while child_of(gale_home, job.id) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    steps = steps_of(client, job.id)
    assert at_cancel <= len(steps) <= at_cancel + 2 and steps == list(range(1, len(steps) + 1))
    assert client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model is None
    assert [each.id for each in jobs.list()] == [waiting.id, job.id]


@pytest.mark.slow
def test_a_file_that_cannot_be_trained_on_fails_its_job_and_names_the_line(client: OpenAI) -> None:
    masked = {"messages": [ROWS[0]["messages"][0], {**ROWS[0]["messages"][1], "weight": 0}]}
    broken = create(client, [*ROWS, masked])
    empty = create(client, ["\n"])
    held_out = create(client, validation_file=upload(client, ["{"]))
    for job, code, param, message in (
        (broken, "invalid_training_file", "training_file", "line 13"),
        (empty, "invalid_training_file", "training_file", "ends with 0 examples"),
        (held_out, "invalid_validation_file", "validation_file", "line 1: it is not JSON"),
    ):
        found = wait(client, job.id, lambda job: job.status == "failed")
        assert found.error is not None
        assert (found.error.code, found.error.param) == (code, param)
        assert message in found.error.message
        assert next(iter(client.fine_tuning.jobs.list_events(job.id))).level == "error"


@pytest.mark.slow
def test_a_loss_that_is_no_number_fails_the_job_and_keeps_its_checkpoints(client: OpenAI) -> None:
    job = create(client, knobs={"n_epochs": 10, "batch_size": 2, "learning_rate_multiplier": 1e38})
    job = wait(client, job.id, lambda job: job.status == "failed")
    assert job.error is not None and job.error.code == "training_diverged"
    assert "train" in job.error.message and "step" in job.error.message
    assert all(
        ":ckpt-step-" in each.fine_tuned_model_checkpoint for each in client.fine_tuning.jobs.checkpoints.list(job.id)
    )


@pytest.mark.slow
def test_preferences_and_graded_answers_train_too(client: OpenAI) -> None:
    question = [{"role": "user", "content": QUESTION}]
    pairs = [
        {
            "input": {"messages": question},
            "preferred_output": [{"role": "assistant", "content": f"To sea {number}."}],
            "non_preferred_output": [{"role": "assistant", "content": "No."}],
        }
        for number in range(12)
    ]
    dpo = create(
        client, pairs, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 1, "batch_size": 4}}}
    )
    rows = [{"messages": question, "answer": "e"} for _ in range(12)]
    knobs = {"n_epochs": 1, "batch_size": 6}
    graded = create(
        client, rows, method={"type": "reinforcement", "reinforcement": {"grader": GRADER, "hyperparameters": knobs}}
    )
    for job in (dpo, graded):
        found = wait(client, job.id, ended)
        assert found.status == "succeeded", found.error
        assert found.fine_tuned_model in [model.id for model in client.models.list()]
    events = list(client.fine_tuning.jobs.list_events(graded.id))
    assert any("train_reward" in e.data for e in events if e.type == "metrics")  # type: ignore[operator]
    found = client.fine_tuning.jobs.retrieve(dpo.id)
    assert found.method is not None and found.method.dpo is not None and found.method.dpo.hyperparameters is not None
    assert found.method.dpo.hyperparameters.beta == 0.2


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
    ({"suffix": "a:b"}, "suffix"),
    ({"suffix": "x" * 65}, "suffix"),
    ({"seed": -1}, "seed"),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 51}}}}, "n_epochs"),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 1}}}}, "beta"),
    ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
    ({"method": {"type": "reinforcement"}}, "method.reinforcement"),
    (
        {"method": {"type": "reinforcement", "reinforcement": {"grader": {"type": "score_model"}}}},
        "method.reinforcement.grader.type",
    ),
    (
        {
            "method": {
                "type": "reinforcement",
                "reinforcement": {"grader": GRADER, "hyperparameters": {"compute_multiplier": 2.0}},
            }
        },
        "compute_multiplier",
    ),
    ({"model": "nobody"}, "model"),
    ({"training_file": "file-none"}, "training_file"),
]


@pytest.mark.parametrize(("change", "param"), REFUSED)
def test_what_is_not_offered_is_refused_by_name(client: OpenAI, change: dict[str, Any], param: str) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        create(client, **change)
    assert param in str(caught.value.param)
    assert list(client.fine_tuning.jobs.list()) == []


def test_more_unfinished_jobs_than_a_project_may_have_are_refused(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GALE_TUNING_JOBS", "1")
    settings.cache_clear()
    job = create(client, knobs=LONG)
    with pytest.raises(openai.RateLimitError, match="GALE_TUNING_JOBS") as caught:
        create(client)
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.response.headers["x-should-retry"] == "false"
    client.fine_tuning.jobs.cancel(job.id)
    client.fine_tuning.jobs.cancel(create(client).id)


def test_an_engine_without_adapters_says_that_it_cannot_be_trained(live: Live) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot be fine-tuned here") as caught:
        client_of(live.url).fine_tuning.jobs.create(model=live.engine.model_id, training_file="file-1")
    assert caught.value.param == "model"


def test_jobs_and_models_of_another_project_do_not_exist(client: OpenAI, own_store: Store) -> None:
    job = create(client, knobs=LONG)
    stranger = replace(LOCAL_OWNER, project_id="proj_other")
    theirs = own_store.fine_tuning(stranger)

    async def ask() -> None:
        assert (await theirs.page(limit=10, after=None)).items == []
        for look in (theirs.get, theirs.cancel, theirs.pause, theirs.resume):
            with pytest.raises(NotFoundError):
                await look(job.id)
        with pytest.raises(NotFoundError):
            await theirs.events(job.id, limit=10, after=None)
        reader = replace(LOCAL_OWNER, role="reader")
        with pytest.raises(NotAllowedError):
            await own_store.fine_tuning(reader).cancel(job.id)

    asyncio.run(ask())
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    for call in (client.fine_tuning.jobs.retrieve, client.fine_tuning.jobs.cancel):
        with pytest.raises(openai.NotFoundError):
            call("ftjob_nobody")
