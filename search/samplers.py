"""Samplers by name. A new one is an `optuna.samplers.BaseSampler` and an entry here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from paretune.search.job_types import Constraint
from paretune.search.surrogate.knowledge import Knowledge
from paretune.search.surrogate.sampler import FrontSampler, Measure, Results
from paretune.spaces.space import SearchSpace


class UniformSampler(BaseSampler):
    """Sweeps the plans that have the same ratio and bits everywhere; no learning at all.

    The trial's number is its position in the sweep (`SearchSpace.sweep`), so it needs no state of its own.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space = space

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The whole space: all parameters are chosen together."""
        return self._space.distributions()

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Parameters of the plan at the trial's position."""
        return self._space.to_params(self._space.sweep(trial.number))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never needed for a parameter of the space; others are an error of the caller."""
        raise KeyError(f"{param_name!r} isn't a parameter of the space")


@dataclass(frozen=True)
class Known:
    """What a sampler may use beyond the space, see `FrontSampler`; Optuna's use nothing of it."""

    objectives: tuple[str, ...] = ("accuracy", "latency_ms")
    constraints: tuple[Constraint, ...] = ()
    knowledge: Knowledge | None = None
    measure: Measure | None = None
    results: Results | None = None


NOTHING = Known()


class MakeSampler(Protocol):
    """Makes a sampler of a space."""

    def __call__(self, space: SearchSpace, seed: int, known: Known = NOTHING) -> BaseSampler: ...


def _front(space: SearchSpace, seed: int, known: Known = NOTHING) -> FrontSampler:
    return FrontSampler(
        space,
        known.knowledge,
        objectives=known.objectives,
        constraints=known.constraints,
        measure=known.measure,
        results=known.results,
        seed=seed,
    )


SAMPLERS: Mapping[str, MakeSampler] = MappingProxyType(
    {
        "front": _front,
        # Jointly: one look at the finished trials a proposal instead of one for each of some forty parameters, which
        # took 200 ms at 64 trials instead of 40.
        "tpe": lambda space, seed, known=NOTHING: TPESampler(seed=seed, multivariate=True),
        "nsga2": lambda space, seed, known=NOTHING: NSGAIISampler(seed=seed),
        "gp": lambda space, seed, known=NOTHING: GPSampler(seed=seed),
        "random": lambda space, seed, known=NOTHING: RandomSampler(seed=seed),
        "uniform": lambda space, seed, known=NOTHING: UniformSampler(space),
    }
)
"""Name to a function that makes the sampler from the space, a seed, and what else is known."""
