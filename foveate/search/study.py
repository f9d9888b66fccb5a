"""Where a search keeps what it tried: an Optuna study, in a file or a database.

The same command goes on where it was stopped. A killed worker's trial is run again where the
storage has heartbeats (databases, by URL).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from foveate.loading import missing

if TYPE_CHECKING:
    import optuna

Direction = Literal["maximize", "minimize"]
BEAT = 60  # seconds between signs of life; twice as long without one, and a trial counts as dead
RETRIES = 3


def opened(
    storage: str, name: str, asked: Mapping[str, Any], *, seed: int, directions: Sequence[Direction]
) -> optuna.Study:
    """The study ``name``, by Bayesian optimisation.

    Of one value by a Gaussian process; of several, or where choices depend on choices, by TPE.

    Args:
        storage: a URL (``sqlite:///file.db``, ``postgresql://…``) or the path of a journal file.
        asked: what decides the values; a study of anything else is refused.

    Raises:
        ImportError: without Optuna.
        ValueError: for a study that was begun with another question.
    """
    try:
        import optuna
    except ImportError as error:
        raise missing("optuna", "search") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=_storage(storage),
        study_name=name,
        directions=list(directions),
        sampler=_sampler(seed, len(directions)),
        load_if_exists=True,
    )
    before = study.user_attrs.get("asked")
    now = json.loads(json.dumps(asked))
    if before is None:
        study.set_user_attr("asked", now)
    elif before != now:
        both = {k: (before.get(k), now.get(k)) for k in before | now}
        other = {k: values for k, values in both.items() if values[0] != values[1]}
        raise ValueError(
            f"{storage} holds a search that was asked something else; (there, now) differ in "
            f"{other}. Name another --storage or -o, or delete it to begin anew."
        )
    return study


def run(
    study: optuna.Study,
    objective: Callable[[optuna.Trial], Any],
    trials: int,
    say: Callable[[str], object],
) -> None:
    """Try until ``trials`` have ended in the study, whoever ran them."""
    import optuna

    ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    enough = optuna.study.MaxTrialsCallback(trials, states=ended)

    def tell(_: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        values = ", ".join(f"{v:.4g}" for v in trial.values or ())
        say(f"trial {trial.number}: {values or 'cannot be met'}")

    if len(study.get_trials(deepcopy=False, states=ended)) < trials:
        study.optimize(objective, callbacks=[enough, tell])


def _sampler(seed: int, values: int) -> Any:
    from optuna import samplers

    if values == 1:
        return samplers.GPSampler(seed=seed, n_startup_trials=4)
    return samplers.TPESampler(seed=seed, n_startup_trials=8)


def _storage(where: str) -> Any:
    from optuna import storages as kinds
    from optuna.storages.journal import JournalFileBackend

    if "://" in where:
        again = kinds.RetryFailedTrialCallback(max_retry=RETRIES)
        return kinds.RDBStorage(where, heartbeat_interval=BEAT, failed_trial_callback=again)
    Path(where).parent.mkdir(parents=True, exist_ok=True)
    return kinds.JournalStorage(JournalFileBackend(where))
