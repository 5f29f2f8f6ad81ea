"""Parameters as rows of numbers, and back."""

from __future__ import annotations

import numpy as np
import optuna
import pytest

from paretune.search.surrogate.encoding import Encoding, Rows
from paretune.spaces.space import MODEL, Options, SearchSpace

SPACE = SearchSpace(
    grids={"stem": [8, 16, 24, 32], "body": [16, 32, 48, 64]},
    widths={"stem": (32, 8), "body": (32, 8, 4), "head": (32,)},
    options=Options(importance=("l1", "l2")),
    ranks={"stem": 0.6, "body": 0.9},
    sparse=("body", "head"),
    shared=("head",),
    variants={"small": SearchSpace(grids={"a": [8, 16]}, widths={"a": (32, 8)})},
)
ENCODING = Encoding(SPACE)


def drawn(count: int) -> list[dict[str, object]]:
    """Parameters that Optuna draws at random."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [study.ask(SPACE.distributions()).params for _ in range(count)]


def test_a_row_keeps_what_parameters_mean() -> None:
    for params in drawn(100):
        row = ENCODING.encode(params)
        again = ENCODING.decode(row)
        assert again.keys() == params.keys()
        assert np.array_equal(ENCODING.encode(again).levels, row.levels)
        one, other = SPACE.to_plan(params), SPACE.to_plan(again)
        # Zeros are cut into eight levels; everything else is kept as it is.
        assert one.model_copy(update={"sparsify": other.sparsify, "finetune": other.finetune}) == other
        assert one.finetune.temperature == pytest.approx(other.finetune.temperature)


@pytest.mark.parametrize("variant", [MODEL, "small"])
def test_every_row_is_in_the_space(variant: str) -> None:
    rng = np.random.default_rng(0)
    counts = [len(unit.levels) for unit in ENCODING.units[variant]]
    for _ in range(50):
        row = Rows(variant, rng.integers(counts)[None], ENCODING.random_settings(1, rng))
        params = ENCODING.decode(row)
        for name, found in SPACE.distributions().items():
            assert found._contains(found.to_internal_repr(params[name]))
        plan = SPACE.to_plan(params)
        assert (plan.variant or MODEL) == variant
        SPACE.to_params(plan)


def test_a_technique_that_is_switched_off_is_at_its_first_level() -> None:
    params = ENCODING.decode(Rows(MODEL, np.array([[1] * len(ENCODING.units[MODEL])]), np.zeros((1, 4))))
    assert params["factorize"]
    row = ENCODING.encode({**params, "factorize": False})
    ranks = [unit.technique == "factorize" for unit in ENCODING.units[MODEL]]
    assert not row.levels[0][ranks].any()


def test_settings_are_scaled_and_choices_one_hot() -> None:
    middle = ENCODING.default_settings()
    assert list(ENCODING.settings) == ["importance", "distill/temperature", "distill/weight", "finetune/learning_rate"]
    assert middle == pytest.approx([0, (8**0.5 - 1) / 7, 0.5, 0.5])  # as `default_of` has them
    assert ENCODING.one_hot(np.array([[1, 0.2, 0.3, 0.4]])) == pytest.approx(np.array([[1, 0.2, 0.3, 0.4]]))
    assert list(ENCODING.continuous) == [False, True, True, True]
