"""paretune's searcher, scheduler and trainable for Ray Tune, on their own or as one run.

`fit` runs all of some work with the settings that suit it. Who has a `ray.tune.Tuner` of their own takes the parts
from `open_search`::

    with open_search("job.yaml") as search:  # with search.executor: ray
        tune.Tuner(
            search.trainable,
            tune_config=tune.TuneConfig(
                search_alg=search.searcher,
                scheduler=search.scheduler,
                num_samples=-1,
                max_concurrent_trials=8,
                reuse_actors=True,
            ),
        ).fit()
        search.finish()

No metric and mode are named: the study has several objectives. Trials that lose their worker are begun again by the
searcher, so ``max_failures`` stays 0; and a search that was stopped goes on from its study, not by ``Tuner.restore``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paretune.search.tune.equipment import Equipment
from paretune.search.tune.run import fit
from paretune.search.tune.scheduler import WorkScheduler
from paretune.search.tune.searcher import WorkSearcher
from paretune.search.tune.trainable import PlanTrainable

if TYPE_CHECKING:
    from paretune.search.tune.opened import TuneSearch, open_search

__all__ = ["Equipment", "PlanTrainable", "TuneSearch", "WorkScheduler", "WorkSearcher", "fit", "open_search"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from paretune.search.tune import opened  # it opens a run, for which `fit` must be there already

    return getattr(opened, name)
