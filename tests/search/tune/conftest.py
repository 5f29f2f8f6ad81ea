"""A small Ray of this machine's own, for trials that stand in for trainings."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import ray

from tests.search.tune import trials


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    """Ray with two CPUs; its workers need not find the tests' modules."""
    ray.init(
        address="local",  # whatever else runs on this machine
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 * 2**20,
    )
    ray.cloudpickle.register_pickle_by_value(trials)
    yield
    ray.cloudpickle.unregister_pickle_by_value(trials)
    ray.shutdown()
