"""What is said where a cluster can't be reached, or can't run the job."""

import socket
from typing import Any

import pytest

from paretune.errors import JobError
from paretune.search.cluster.connection import connect, lacking
from paretune.search.job import Job, make_job
from paretune.search.job_sections import RaySection

pytestmark = pytest.mark.ray

NODES: list[dict[str, Any]] = [
    {"Alive": True, "Resources": {"CPU": 4.0, "memory": 8e9}},
    {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0, "memory": 32e9, "edge": 1.0}},
    {"Alive": False, "Resources": {"CPU": 64.0, "box": 1.0}},
]


def section(**keys: Any) -> RaySection:
    return RaySection.model_validate(keys)


def job(**keys: Any) -> Job:
    return make_job({"name": "one", "model": {"factory": "m:f"}, "data": "digits", "ray": keys})


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_refuses_a_cluster_that_isnt_there(closed_port: int) -> None:
    with pytest.raises(JobError, match=rf"ray\.address must be .* reached, .*{closed_port}.*ray start"):
        connect(job(address=f"127.0.0.1:{closed_port}"))


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:port", "http://head:8265"])
def test_refuses_an_address_that_is_none(address: str) -> None:
    with pytest.raises(JobError, match=r"ray\.address") as error:
        connect(job(address=address))
    assert address in str(error.value)


@pytest.mark.parametrize(
    "keys",
    [{}, {"resources": {"cpu": 4}}, {"resources": {"cpu": 2, "gpu": 0.5, "memory_gb": 16}}, {"measure": "edge"}],
    ids=["anything", "large", "with a GPU", "measured apart"],
)
def test_fits(keys: dict[str, Any]) -> None:
    assert lacking(NODES, section(**keys)) is None


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"resources": {"cpu": 8}}, "fit on one node: 8 CPU, but got nodes with 4 CPU; 2 CPU"),
        ({"resources": {"cpu": 4, "gpu": 1}}, "4 CPU, 1 GPU, but got nodes with 4 CPU, 0 GPU; 2 CPU, 1 GPU"),
        ({"resources": {"memory_gb": 64}}, "64 GB of memory, but got nodes with"),
        ({"resources": {"custom": {"a100": 1}}}, "1 a100"),
        ({"measure": "box"}, "'box', of which nodes have none"),
    ],
    ids=["cores", "on one node", "memory", "custom", "measuring node gone"],
)
def test_says_what_lacks(keys: dict[str, Any], words: str) -> None:
    assert words in str(lacking(NODES, section(**keys)))


def test_counts_what_measures() -> None:
    wanted = section(measure="edge", resources={"gpu": 0.5})
    assert lacking(NODES, wanted) is None
    assert "0 GPU beside what measures" in str(lacking(NODES, wanted, {"edge": 1.0, "GPU": 1.0}))


def test_measures_one_at_a_time() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0, "edge": 2.0}}]
    assert "of which nodes have 2" in str(lacking(nodes, section(measure="edge")))
