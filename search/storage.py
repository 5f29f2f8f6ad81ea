"""Optuna's relational storage for a driver with hundreds of running trials and thousands of finished ones."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, cast

import sqlalchemy
from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

Row = sqlalchemy.Row[Any]

_CHUNK = 500
"""Trials that are read at once: databases limit how many a query may name."""

_TRIALS, _PARAMS = models.TrialModel.__table__, models.TrialParamModel.__table__
_USER, _SYSTEM = models.TrialUserAttributeModel.__table__, models.TrialSystemAttributeModel.__table__
_VALUES = models.TrialValueModel.__table__
_STUDY_USER = models.StudyUserAttributeModel.__table__


class Packed(Mapping[str, Any]):
    """Attributes of a finished trial, compressed: a plan and a record take a tenth of the memory.

    Args:
        texts: Name to JSON.
    """

    __slots__ = ("_texts",)

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = {name: zlib.compress(text.encode(), 1) for name, text in texts.items()}

    def __getitem__(self, name: str) -> Any:
        return json.loads(zlib.decompress(self._texts[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def __contains__(self, name: object) -> bool:
        return name in self._texts  # without reading it


@dataclass
class _Unwritten:
    """What was set of a trial and isn't in the database yet.

    Attributes:
        params: Name to the value as Optuna stores it, and its distribution.
        user: Name to the value, and whether the database has another one under that name.
        system: The same.
    """

    params: dict[str, tuple[float, BaseDistribution]] = field(default_factory=dict)
    user: dict[str, tuple[Any, bool]] = field(default_factory=dict)
    system: dict[str, tuple[Any, bool]] = field(default_factory=dict)


class TrialStorage(BaseStorage):
    """One study of a database, with its trials in memory, written a trial at a time.

    Optuna's own cache reads all that is unfinished anew, with all parameters, each time that a sampler looks at the
    trials, and writes each parameter and attribute in a transaction of its own. With 512 running trials that takes
    seconds for each new one. Here whoever begins a trial is the only one who writes to it, so it isn't read again, and
    what is set of it is written at once: by `flush`, and before its state changes. Until then it is lost if the process
    is killed. Trials that others enqueue, run and end in the same study are seen.

    Not for several threads.

    Args:
        backend: The database.
        marks: User attributes of every trial that is begun here; it has them from the moment when it runs.
    """

    def __init__(self, backend: RDBStorage, marks: Mapping[str, Any] | None = None) -> None:
        self._backend = backend
        self._marks = dict(marks or {})
        self._study_id: int | None = None
        self._looked = 0  # the latest id that a look for new trials came to
        self._trials: dict[int, FrozenTrial] = {}
        self._open: dict[int, FrozenTrial] = {}
        self._own: set[int] = set()
        self._unwritten: dict[int, _Unwritten] = {}
        self._known: dict[str, BaseDistribution] = {}
        self._distributions: dict[str, BaseDistribution] = {}
        self._texts: dict[str, tuple[BaseDistribution, str]] = {}
        self._directions: list[StudyDirection] | None = None

    # Studies: asked for rarely, so the database answers.

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        return self._backend.create_new_study(directions, study_name)

    def delete_study(self, study_id: int) -> None:
        self._backend.delete_study(study_id)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._backend.set_study_user_attr(study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._backend.set_study_system_attr(study_id, key, value)

    def agree(self, study_id: int, key: str, value: Any) -> Any:
        """What a study's user attribute was set to first: this value, if nobody has set it yet.

        Of several drivers that come at once, the database lets one be the first.
        """
        columns = _STUDY_USER.c
        stored = sqlalchemy.select(columns.value_json).where((columns.study_id == study_id) & (columns.key == key))
        row = {"study_id": study_id, "key": key, "value_json": json.dumps(value)}
        try:
            with self._backend.engine.begin() as connection:
                text = connection.scalar(stored)
                if text is None:
                    connection.execute(sqlalchemy.insert(_STUDY_USER), row)
        except sqlalchemy.exc.IntegrityError:  # somebody was quicker
            with self._backend.engine.connect() as connection:
                text = connection.scalar(stored)
        return value if text is None else json.loads(text)

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._backend.get_study_id_from_name(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._backend.get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        if self._directions is None:  # samplers ask for them again and again
            self._directions = self._backend.get_study_directions(study_id)
        return self._directions

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._backend.get_study_user_attrs(study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._backend.get_study_system_attrs(study_id)

    def get_all_studies(self) -> list[Any]:
        return self._backend.get_all_studies()

    def remove_session(self) -> None:
        self._backend.remove_session()

    # Trials

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        is_running = template_trial is None
        if is_running and self._marks:
            template_trial = create_trial(state=TrialState.RUNNING, user_attrs=self._marks)
        trial_id = self._backend.create_new_trial(study_id, template_trial)
        if is_running:  # what waits may be begun by anybody
            self._own.add(trial_id)
        self._take(self._read([trial_id]))
        return trial_id

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        trial = self._updatable(trial_id)
        known = self._distributions.setdefault(param_name, distribution)
        if known is not distribution:
            check_distribution_compatibility(known, distribution)
        trial.params[param_name] = distribution.to_external_repr(param_value_internal)
        trial.distributions[param_name] = distribution
        self._to_write(trial_id).params[param_name] = param_value_internal, distribution

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        _set(self._updatable(trial_id).user_attrs, self._to_write(trial_id).user, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        _set(self._updatable(trial_id).system_attrs, self._to_write(trial_id).system, key, value)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        self._updatable(trial_id).intermediate_values[step] = intermediate_value
        self._backend.set_trial_intermediate_value(trial_id, step, intermediate_value)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        self.flush()
        if state == TrialState.RUNNING:
            return self._begin(trial_id)
        if not self._backend.set_trial_state_values(trial_id, state, values):
            return False
        if trial_id not in self._trials:
            self._take(self._read([trial_id]))
            return True
        trial = copy.copy(self._trials[trial_id])  # who was given it before goes on seeing that
        trial.state, trial.datetime_complete = state, datetime.now()
        if values is not None:
            trial.values = values
        trial.user_attrs = _packed({name: json.dumps(value) for name, value in trial.user_attrs.items()})
        self._take([trial])
        return True

    def flush(self) -> None:
        """Write what was set of trials since the last time, in one transaction."""
        if self._unwritten:
            with self._backend.engine.begin() as connection:
                self._write(connection)
            self._unwritten.clear()

    def get_trial(self, trial_id: int) -> FrozenTrial:
        if trial_id not in self._trials:
            self._take(self._read([trial_id]))
        trial = self._trials[trial_id]
        return trial if trial.state.is_finished() else _snapshot(trial)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        self._look_for_others(study_id)
        if states is None:
            found = list(self._trials.values())
        elif any(state in states for state in TrialState if state.is_finished()):
            found = [trial for trial in self._trials.values() if trial.state in states]
        else:
            found = [trial for trial in self._open.values() if trial.state in states]
        return copy.deepcopy(found) if deepcopy else found

    # What they are made of

    def _begin(self, trial_id: int) -> bool:
        """Take a trial that waits; False where somebody else was quicker."""
        known = self.get_trial(trial_id)
        self.check_trial_is_updatable(trial_id, known.state)
        waits = (_TRIALS.c.trial_id == trial_id) & (_TRIALS.c.state == TrialState.WAITING)
        begin = sqlalchemy.update(_TRIALS).where(waits).values(state=TrialState.RUNNING, datetime_start=datetime.now())
        with self._backend.engine.begin() as connection:
            if not connection.execute(begin).rowcount:
                return False
            for key, value in self._marks.items():  # together, so that a trial that runs is somebody's
                self.set_trial_user_attr(trial_id, key, value)
            self._write(connection)
        self._unwritten.clear()
        self._own.add(trial_id)
        self._take(self._read([trial_id]))
        return True

    def _write(self, connection: sqlalchemy.Connection) -> None:
        """Write what was set of trials."""
        params = [
            {"trial_id": trial_id, "param_name": name, "param_value": value, "distribution_json": self._json(name, one)}
            for trial_id, unwritten in self._unwritten.items()
            for name, (value, one) in unwritten.params.items()
        ]
        if params:
            connection.execute(sqlalchemy.insert(_PARAMS), params)
        of_users = {trial_id: unwritten.user for trial_id, unwritten in self._unwritten.items()}
        of_optuna = {trial_id: unwritten.system for trial_id, unwritten in self._unwritten.items()}
        for table, attributes in ((_USER, of_users), (_SYSTEM, of_optuna)):
            new = list[dict[str, Any]]()
            for trial_id, found in attributes.items():
                for key, (value, is_stored) in found.items():
                    text = json.dumps(value)
                    if is_stored:
                        same = (table.c.trial_id == trial_id) & (table.c.key == key)
                        connection.execute(sqlalchemy.update(table).where(same).values(value_json=text))
                    else:
                        new.append({"trial_id": trial_id, "key": key, "value_json": text})
            if new:
                connection.execute(sqlalchemy.insert(table), new)

    def _take(self, trials: Iterable[FrozenTrial]) -> None:
        """Keep trials as they are now."""
        for trial in trials:
            number = trial._trial_id
            _put(self._trials, trial)
            if not trial.state.is_finished():
                _put(self._open, trial)
                continue
            self._open.pop(number, None)
            self._own.discard(number)
            if trial.distributions == self._known:  # those of most trials are the same: one dictionary for all
                trial.distributions = self._known
            self._known = trial.distributions

    def _updatable(self, trial_id: int) -> FrozenTrial:
        trial = self._trials[trial_id]
        self.check_trial_is_updatable(trial_id, trial.state)
        return trial

    def _to_write(self, trial_id: int) -> _Unwritten:
        return self._unwritten.setdefault(trial_id, _Unwritten())

    def _look_for_others(self, study_id: int) -> None:
        """Read the trials of other writers that are new or in another state."""
        if study_id != (self._study_id or study_id):
            raise ValueError(f"a storage is of one study, but got the trials of {self._study_id} and {study_id}")
        self._study_id = study_id
        with self._backend.engine.connect() as connection:
            is_new = (_TRIALS.c.study_id == study_id) & (_TRIALS.c.trial_id > self._looked)
            new = connection.scalars(sqlalchemy.select(_TRIALS.c.trial_id).where(is_new)).all()
            self._looked = max(new, default=self._looked)
            changed = [number for number in new if number not in self._trials]  # or else it was made here
            for some in _parts([number for number in self._open if number not in self._own]):
                query = sqlalchemy.select(_TRIALS.c.trial_id, _TRIALS.c.state).where(_TRIALS.c.trial_id.in_(some))
                for number, state in connection.execute(query):
                    known = self._open[number]
                    # What runs without parameters was seen between its creation and their being drawn.
                    if state != known.state or (state == TrialState.RUNNING and not known.params):
                        changed.append(number)
        if changed:
            self._take(self._read(sorted(changed)))

    def _read(self, numbers: Sequence[int]) -> Iterator[FrozenTrial]:
        """Trials as the database has them. Without intermediate values: trials of several objectives have none."""
        with self._backend.engine.connect() as connection:
            for some in _parts(numbers):
                query = sqlalchemy.select(_TRIALS).where(_TRIALS.c.trial_id.in_(some)).order_by(_TRIALS.c.trial_id)
                # First the states, which are written last: a trial that ended meanwhile is read as if it still ran.
                trials = connection.execute(query).all()
                found = {table: _rows_of(connection, table, some) for table in (_PARAMS, _VALUES, _USER, _SYSTEM)}
                for row in trials:
                    yield self._frozen(row, {table: rows.get(row.trial_id, []) for table, rows in found.items()})

    def _frozen(self, row: Row, own: Mapping[sqlalchemy.Table, list[Row]]) -> FrozenTrial:
        found = {one.param_name: (one.param_value, self._distribution(one)) for one in own[_PARAMS]}
        values = sorted(own[_VALUES], key=lambda one: one.objective)
        texts = {one.key: one.value_json for one in own[_USER]}
        return FrozenTrial(
            number=row.number,
            state=row.state,
            value=None,
            values=[models.TrialValueModel.stored_repr_to_value(one.value, one.value_type) for one in values] or None,
            datetime_start=_local(row.datetime_start),
            datetime_complete=_local(row.datetime_complete),
            params={name: one.to_external_repr(value) for name, (value, one) in found.items()},
            distributions={name: one for name, (_, one) in found.items()},
            user_attrs=_packed(texts) if row.state.is_finished() else {k: json.loads(v) for k, v in texts.items()},
            system_attrs={one.key: json.loads(one.value_json) for one in own[_SYSTEM]},
            intermediate_values={},
            trial_id=row.trial_id,
        )

    def _distribution(self, param: Row) -> BaseDistribution:
        """The same object for all trials that have the same one."""
        known = self._distributions.get(param.param_name)
        if known is not None and self._json(param.param_name, known) == param.distribution_json:
            return known
        found = json_to_distribution(param.distribution_json)
        return self._distributions.setdefault(param.param_name, found) if known is None else found

    def _json(self, name: str, distribution: BaseDistribution) -> str:
        known, text = self._texts.get(name, (None, ""))
        if known is not distribution:
            text = distribution_to_json(distribution)
            self._texts[name] = distribution, text
        return text


def _put(trials: dict[int, FrozenTrial], trial: FrozenTrial) -> None:
    """Keep trials in the order of their ids; those of others may come late."""
    number = trial._trial_id
    is_late = number not in trials and number < next(reversed(trials), 0)
    trials[number] = trial
    if is_late:
        ordered = sorted(trials.items())
        trials.clear()
        trials.update(ordered)


def _set(known: dict[str, Any], unwritten: dict[str, tuple[Any, bool]], key: str, value: Any) -> None:
    """Set an attribute of a trial, which is written later."""
    is_stored = unwritten[key][1] if key in unwritten else key in known
    known[key] = value
    unwritten[key] = value, is_stored


def _rows_of(
    connection: sqlalchemy.Connection, table: sqlalchemy.Table, numbers: Sequence[int]
) -> dict[int, list[Row]]:
    """The rows of a table that belong to some trials, in the order in which they were written."""
    found: dict[int, list[Row]] = {}
    query = sqlalchemy.select(table).where(table.c.trial_id.in_(numbers)).order_by(*table.primary_key)
    for row in connection.execute(query):
        found.setdefault(row.trial_id, []).append(row)
    return found


def _parts(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    return (numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK))


def _packed(texts: Mapping[str, str]) -> dict[str, Any]:
    return cast("dict[str, Any]", Packed(texts))  # Optuna only reads them


def _snapshot(trial: FrozenTrial) -> FrozenTrial:
    """What the caller may go on changing, as Optuna's own trials do."""
    found = copy.copy(trial)
    found.params, found.distributions = dict(trial.params), dict(trial.distributions)
    found.user_attrs, found.system_attrs = dict(trial.user_attrs), dict(trial.system_attrs)
    return found


def _local(moment: datetime | None) -> datetime | None:
    """Local time; databases hold UTC."""
    return None if moment is None else moment.replace(tzinfo=timezone.utc).astimezone().replace(tzinfo=None)
