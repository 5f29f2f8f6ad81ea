"""What is redundant in a layer, on layers where it is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretune.objectives.compress import Context
from paretune.objectives.data import Split
from paretune.objectives.redundancy import measure_redundancy, similarity
from paretune.objectives.tasks import Classification
from tests import nets


def linear(rows: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows))
    return layer


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([[1, 0], [0, 1]], 0.0, id="at right angles"),
        pytest.param([[1, 2], [2, 4], [1e-20, 2e-20]], 1.0, id="the same but for their length"),
        pytest.param([[1, 0], [-1, 0]], -1.0, id="opposite"),
        pytest.param([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], 0.5, id="two of four doubled"),
        pytest.param([[1, 0], [0, 1], [0, 0], [0, 0]], 0.5, id="two of four zero"),
        pytest.param([[3, 4]], None, id="alone"),
    ],
)
def test_similarity_counted_by_hand(rows: list[list[float]], expected: float | None) -> None:
    found = similarity(linear(rows))
    assert found is None if expected is None else found == pytest.approx(expected, abs=1e-6)


def test_similarity_in_parts_is_that_of_all_pairs() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 1500)
    weight = F.normalize(layer.weight.detach(), dim=1)
    cosines = (weight @ weight.T).fill_diagonal_(-1)
    assert similarity(layer) == pytest.approx(float(cosines.amax(1).mean()), abs=1e-5)


def test_filters_are_compared_with_those_that_read_the_same_channels() -> None:
    assert similarity(nn.Conv2d(8, 8, 3, groups=8)) is None
    torch.manual_seed(0)
    grouped = nn.Conv2d(8, 4, 3, groups=2)
    first, second = grouped.weight.detach()[:2].flatten(1)
    with torch.no_grad():
        grouped.weight[2:] = grouped.weight[:2]  # doubles, but of other channels
    assert similarity(grouped) == pytest.approx(float(F.cosine_similarity(first, second, dim=0)), abs=1e-5)
    transposed = nn.ConvTranspose2d(6, 4, 3)
    with torch.no_grad():
        transposed.weight[:, 2:] = 3 * transposed.weight[:, :2]
    assert similarity(transposed) == pytest.approx(1.0, abs=1e-5)


class Planted(nn.Module):
    """A convolution of which 3 of 8 channels are dead, and a linear layer of rank 2 without a rectifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.head = nn.Linear(8, 6)
        with torch.no_grad():
            self.conv.bias.copy_(torch.tensor([9.0] * 5 + [-9.0] * 3))
            self.head.weight.copy_(torch.randn(6, 2) @ torch.randn(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


def context(inputs: Tensor) -> Context:
    data = Split(inputs, torch.zeros(len(inputs), dtype=torch.int64))
    return Context(data.head(2).inputs, {}, Classification(), list(data.batches(8)))


def test_dead_channels_and_low_rank_are_found() -> None:
    torch.manual_seed(0)
    model = Planted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    conv, head = measure_redundancy(model, ["conv", "head"], context(torch.rand(16, 1, 6, 6)))
    assert conv.zeros == pytest.approx(3 / 8, abs=1e-6)
    assert head.zeros is None
    assert head.rank is not None
    assert head.rank <= 2 / 6 + 1e-6
    assert conv.to_dict() == {"layer": "conv", "similarity": conv.similarity, "zeros": conv.zeros, "rank": conv.rank}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [nets.Residual, nets.Depthwise, nets.Grouped, nets.UNet, nets.Fold])
def test_values_of_trained_nets_are_in_range(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind()
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
    found = measure_redundancy(model, layers, context(nets.image(4)))  # type: ignore[arg-type]
    assert [one.layer for one in found] == layers
    for one in found:
        assert one.similarity is None or -1 <= one.similarity <= 1
        assert one.zeros is None or 0 <= one.zeros <= 1
        assert one.rank is None or 0 < one.rank <= 1
    assert any(one.zeros is not None for one in found)
