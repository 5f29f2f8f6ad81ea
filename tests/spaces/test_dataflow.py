"""Which layers feed a step, and which read it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paretune.spaces.dataflow import Trace, tensors_in


def layer(trace: Trace, name: str, *inputs: Tensor) -> Tensor:
    """What a layer of that name would make of its inputs."""
    output = torch.stack(inputs).sum(0) * 2
    trace.add("", inputs, output, name=name)
    return output


def test_layers_before_and_behind_are_the_nearest() -> None:
    with Trace() as trace:
        x = layer(trace, "first", torch.ones(2, 3))
        x = layer(trace, "second", x.relu())
        y = x.view(3, 2).transpose(0, 1)
        y += layer(trace, "side", x)  # in place
        start = len(trace.steps) - 1
        layer(trace, "last", layer(trace, "third", y.sigmoid()))
    assert trace.before(start) == {"second", "side"}
    assert trace.behind(start) == {"third"}


@pytest.mark.parametrize("folded", [False, True])
def test_shares_tell_their_heads_and_where_they_mix(folded: bool) -> None:
    shape = (8, 5, 6) if folded else (2, 4, 5, 6)
    with Trace() as trace:
        values = layer(trace, "values", torch.ones(*shape[:-2], 6, 3))
        shares = layer(trace, "scores", torch.ones(shape)).softmax(-1)
        torch.dropout(shares, 0.5, train=False) @ values
    place = next(place for place, step in enumerate(trace.steps) if step.heads)
    assert (trace.steps[place].heads, trace.steps[place].folded) == ((8, True) if folded else (4, False))
    mixer = trace.mixer(place)
    assert mixer is not None
    assert trace.before(mixer) == {"scores", "values"}


def test_a_softmax_over_one_entry_is_no_attention() -> None:
    with Trace() as trace:
        torch.ones(2, 4, 5, 1).softmax(-1)
        torch.ones(2, 10).softmax(-1)
    assert [step.heads for step in trace.steps if step.function == "softmax"] == [0, 0]


def test_tensors_are_found_in_nested_values() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert [int(tensor) for tensor in tensors_in({"a": [a, (b, None)], "b": 3})] == [0, 1]
