"""What is known before the first trial survives the file that a run keeps it in."""

from __future__ import annotations

import json

from paretune.search.surrogate.knowledge import Architecture, Knowledge, LayerCost, Outlined, layer_costs
from paretune.spaces.analysis import Analysis, Layer
from paretune.spaces.graph import Group

KNOWLEDGE = Knowledge(
    dense={"accuracy": 0.9, "latency_ms": 1.25, "size_bytes": 4096},
    architectures={
        "model": Architecture(
            (LayerCost("conv", 900, 90, 0.7, "conv", ()), LayerCost("fc", 100, 10, 0.2, None, ("conv", "twin"))),
            {"prune/conv": {0.25: 0.01, 0.5: -0.002}, "bits/fc": {8.0: 0.0}},
        ),
        "small": Architecture(()),
    },
    outlines=(Outlined({"prune/conv": 0.5, "bits/fc": 8, "factorize": False, "method": "svd"}, {"latency_ms": 0.5}),),
    seconds={"sensitivity": 1.5, "outlines": 2.0},
)


def test_json_round_trip() -> None:
    text = json.dumps(KNOWLEDGE.to_dict(), allow_nan=False)
    again = Knowledge.from_dict(json.loads(text))
    assert again == KNOWLEDGE
    assert again.architectures["model"].damage["prune/conv"][0.25] == 0.01, "levels are numbers again"
    assert isinstance(again.outlines[0].params["bits/fc"], int), "a choice of Optuna's must stay what it is"


def test_of_nothing_too() -> None:
    assert Knowledge.from_dict(json.loads(json.dumps(Knowledge({}).to_dict()))) == Knowledge({})


def test_layers_know_the_groups_that_cut_them() -> None:
    analysis = Analysis(
        groups=(Group("a", 32, ("a", "twin"), ("last",)), Group("b", 16, ("b",), ("last",))),
        frozen=(),
        layers=tuple(Layer(name, "Conv2d", 100, 1000, None) for name in ("a", "twin", "b", "last")),
        params=400,
        macs=4000,
        latency_share={"a": 0.25, "last": 0.5},
    )
    found = {layer.name: layer for layer in layer_costs(analysis)}
    assert [layer.output for layer in found.values()] == ["a", "a", "b", None]
    assert found["last"].inputs == ("a", "b")
    assert (found["last"].share, found["b"].share) == (0.5, 0.0)
