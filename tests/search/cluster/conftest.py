"""A Ray of the tests' own, with one gauge for the tiny job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from paretune.search.cluster.connection import connect
from paretune.search.cluster.gauges import Gauges, open_gauges
from paretune.search.job import Job
from tests.search.conftest import TinyJob


@pytest.fixture(scope="session")
def job(tiny: TinyJob, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return tiny(tmp_path_factory.mktemp("cluster"), finetune={"device": "cpu"})


@pytest.fixture(scope="module")
def gauges(job: Job) -> Iterator[Gauges]:
    with closing(connect(job)), open_gauges(job, print) as found:
        yield found
