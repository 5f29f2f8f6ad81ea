"""The sampler `front`: proposes the plan that is expected to add most to the front."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from threadpoolctl import ThreadpoolController

from paretune.search.job_types import Constraint
from paretune.search.surrogate.beliefs import Beliefs
from paretune.search.surrogate.choice import Choice
from paretune.search.surrogate.costs import CostErrors, cost_errors
from paretune.search.surrogate.encoding import Encoding, Rows
from paretune.search.surrogate.knowledge import Knowledge
from paretune.spaces.plan import CompressionPlan
from paretune.spaces.space import SearchSpace

_AT_ONCE = 8
"""Of so many running trials, one more is planned at once: what comes of the first can't tell much about the last."""

Measure = Callable[[CompressionPlan], Mapping[str, float] | None]
"""Deploys a plan untrained and tells what it costs, named as objectives are; None where it can't be deployed."""

Expected = tuple[float, float]
"""Mean and standard deviation of an accuracy."""

Results = Callable[[FrozenTrial], tuple[Mapping[str, float], Expected | None] | None]
"""What is known of an ended trial beyond its values: costs by name, and the accuracy that a stopped one would have
reached. None where the trial was lost through no fault of its plan."""


class FrontSampler(BaseSampler):
    """Proposes the plan that is expected to add most to the hypervolume of the front.

    What a plan costs is predicted from those that were deployed, and the best few are deployed and measured, untrained,
    before one is chosen; only its accuracy is uncertain. A Gaussian process learns that over a few features: the
    damage that probes foresee, by technique, how much of the model is left, and how it is trained. Trials that are
    still running count as what is believed of them, so that many workers don't propose the same plan; where there are
    many, several plans are chosen together, and what was learnt meanwhile counts for the next ones.

    It serves any Optuna study whose parameters are those of a space (``study.ask(space.distributions())``).

    Args:
        space: What plans are made of.
        knowledge: What is known before the first trial; without it, every layer is believed to be as sensitive and as
            costly as any other.
        objectives: The study's, in its order: ``accuracy`` and one to three more.
        constraints: Bounds of the job.
        measure: None trusts the predictions of what plans cost.
        measured: How many plans are measured for each proposal, at most.
        results: None knows no more than a trial's values.
        seed: Of the random numbers.
    """

    def __init__(
        self,
        space: SearchSpace,
        knowledge: Knowledge | None = None,
        *,
        objectives: Sequence[str] = ("accuracy", "latency_ms"),
        constraints: Sequence[Constraint] = (),
        measure: Measure | None = None,
        measured: int = 2,
        results: Results | None = None,
        seed: int | None = None,
    ) -> None:
        self._distributions = space.distributions()
        self._space = space
        self._encoding = Encoding(space)
        self._objectives = tuple(objectives)
        self._beliefs = Beliefs(self._encoding, knowledge or Knowledge({}), objectives, constraints)
        self._choice = Choice(self._encoding, self._beliefs, np.random.default_rng(seed))
        self._measure = measure
        self._measured = measured
        self._results = results
        self._observed: set[int] = set()
        self._settled = 0
        """All trials before this number have ended and were observed."""
        self._running: dict[int, Rows] = {}
        self._planned: deque[Rows] = deque()
        self._is_stale, self._was_asked = True, False
        self._threads = ThreadpoolController()

    def reseed_rng(self) -> None:
        """Draw other random numbers than another process with the same seed."""
        self._choice.rng = np.random.default_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The whole space: all parameters are chosen together."""
        return self._distributions

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never needed for a parameter of the space; others are an error of the caller."""
        raise KeyError(f"{param_name!r} isn't a parameter of the space")

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Parameters of the next plan."""
        if search_space.keys() <= trial.system_attrs.get("fixed_params", {}).keys():
            return {}  # enqueued: nothing is left to choose
        self._was_asked = True
        if not self._planned:
            pending = self._look_at(study)
            with self._threads.limit(limits=1, user_api="blas"):  # matrices are small, and workers train on the cores
                self._learn()
                measure, plans = self._cost_of if self._measure else None, 1 + len(pending) // _AT_ONCE
                self._planned.extend(self._choice.next(pending, measure, self._measured, plans=plans))
        return self._encoding.decode(self._planned.popleft())

    def _look_at(self, study: Study) -> list[Rows]:
        """Observe the trials that ended; returns the plans of those that are running."""
        trials = study.get_trials(deepcopy=False)
        pending = []
        for found in trials[self._settled :]:
            if found.state.is_finished():
                if found.number not in self._observed:
                    self._observe(found, found.state, found.values)
            elif found.state == TrialState.RUNNING and (row := self._row_of(found)):
                self._running[found.number] = row
                pending.append(row)
        while self._settled < len(trials) and trials[self._settled].state.is_finished():
            self._observed.discard(self._settled)
            self._settled += 1
        return pending

    def _row_of(self, trial: FrozenTrial) -> Rows | None:
        """The plan of a trial; None of one whose parameters aren't all drawn."""
        if not trial.params.keys() >= self._distributions.keys():
            return None
        return self._running.get(trial.number) or self._encoding.encode(trial.params)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Learn from a trial when it is told, so that no time is lost when the next one is asked for.

        As long as there are plans left, or if none was asked for since, there is no hurry.
        """
        self._observe(trial, state, values)
        if self._was_asked and not self._planned:
            self._was_asked = False
            with self._threads.limit(limits=1, user_api="blas"):
                self._learn()

    def latency_errors(self) -> CostErrors | None:
        """How far off latencies were, each predicted before its plan was measured; None for none."""
        pairs = self._beliefs.ledger.predicted
        return cost_errors(*zip(*pairs, strict=True)) if pairs else None

    def _observe(self, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Take in a trial that ended; one that was killed before its last parameter was drawn says nothing."""
        self._observed.add(trial.number)
        row = self._row_of(trial)
        self._running.pop(trial.number, None)
        if row is None:
            return
        known = self._results(trial) if self._results else ({}, None)
        if known is None:
            return
        costs, expected = known
        self._is_stale = True
        told = dict(zip(self._objectives, values, strict=True)) if state == TrialState.COMPLETE and values else {}
        self._beliefs.ledger.note(row, {**costs, **told})
        if told:
            self._beliefs.seen.take(row, told["accuracy"], 0.0)
        elif state == TrialState.PRUNED and expected:
            self._beliefs.seen.take(row, *expected)
        else:  # failed, or ended before its accuracy could be foreseen
            self._beliefs.seen.failed.update(self._encoding.keys(row))

    def _learn(self) -> None:
        if self._is_stale:
            self._beliefs.learn()
            self._choice.refresh()
            self._is_stale = False

    def _cost_of(self, row: Rows) -> Mapping[str, float] | None:
        assert self._measure is not None
        return self._measure(self._space.to_plan(self._encoding.decode(row)))
