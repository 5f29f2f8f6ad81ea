"""Low-rank factorization: a layer becomes two or three thinner ones, run one after the other.

Linear layers and convolutions with a kernel of one weight are split by truncated SVD (Denton et al., 2014,
arXiv:1404.0736), other convolutions by Tucker-2 (Kim et al., 2016, arXiv:1511.06530) or along the axes of their kernel
(Jaderberg et al., 2014, arXiv:1405.3866). Convolutions in one or three dimensions are always split by Tucker-2.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from paretune.errors import TrialError
from paretune.objectives.compress.factors import way_of
from paretune.objectives.compress.layers import replace_module, why_special
from paretune.spaces.copies import copy_of
from paretune.spaces.graph import Forward, execution_order
from paretune.spaces.plan import Factorization, Method

if TYPE_CHECKING:
    from paretune.objectives.compress import Context


class Factorized(nn.Sequential):
    """What stands in the place of a factorized layer: its factors ``0``, ``1`` and perhaps ``2``, in order.

    It has no weight of its own; `factorizable` finds the layers of which something else reads the weight.
    """


def factorize(model: nn.Module, config: Factorization, context: Context, fraction: float = 1.0) -> nn.Module:
    """Put factors in the place of each layer that `config.ranks` names, in place.

    What is done depends on the layer's shape and its share alone. One whose factors aren't smaller stays whole: a share
    that is right for the dense layer may be too large for the pruned one.

    Args:
        model: The model, pruned.
        config: Resolved: its `energy` does nothing here.
        context: Without batches the factors' weights are zero, as they will be loaded.
        fraction: Share of the whole cut that is reached; nothing happens before the last cut, as factors of factors
            would be worse than those of the layer.

    Raises:
        TrialError: A layer can't be factorized, or its weights aren't finite.
    """
    if fraction < 1:
        return model
    for name, share in config.ranks.items():
        if reason := why_whole(model, name):
            raise TrialError(f"a layer must be one that can be factorized, but got {name}: {reason}; leave it out")
        layer = model.get_submodule(name)
        if not is_smaller(layer, config.method, share):
            continue
        try:
            factors = split(layer, config.method, share, empty=not context.batches)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise TrialError(
                f"a factorized layer must have finite weights, but those of {name} have no singular values "
                f"({error}); lower the learning rate"
            ) from error
        replace_module(model, name, factors)
    return model


def resolve_ranks(model: nn.Module, config: Factorization, context: Context) -> Factorization:
    """Put the ranks that keep `config.energy` in its place; the model isn't changed.

    Each layer gets the smallest share of its full rank that keeps at least this share of the sum of its squared
    singular values (for Tucker-2: of its squared weights, which is the same sum for an SVD). Layers whose factors then
    don't have fewer parameters and fewer multiply-accumulates than the layer stay whole.
    """
    if config.energy is None:
        return config
    ranks = {}
    for name, reason in factorizable(model, context.forward, config.method).items():
        if not reason and not context.excludes(name):
            layer = model.get_submodule(name)
            share = share_keeping(layer, config.method, config.energy)
            if share is not None and is_smaller(layer, config.method, share):
                ranks[name] = share
    return Factorization(ranks=ranks, method=config.method)


def layers_of(model: nn.Module, name: str) -> list[str]:
    """Names of the layers that `name` is made of now: itself, or its factors.

    A `QuantizedLayer` counts as the layer that it wraps.
    """
    module = model.get_submodule(name)
    return [f"{name}.{child}" for child, _ in module.named_children()] if isinstance(module, Factorized) else [name]


def split(layer: nn.Module, method: Method, share: float, *, empty: bool = False) -> Factorized:
    """The factors of a layer, whose own weights stay as they are.

    Args:
        layer: Linear or a convolution without groups.
        method: How convolutions are split whose kernel has more than one weight.
        share: Of the full rank that stays, in (0, 1]; at 1 the factors compute what the layer does.
        empty: Leave their weights zero, which takes no decomposition.
    """
    way = way_of(layer, method)
    ranks = way.ranks(share)
    shapes, bias = way.factors(ranks), cast("Tensor | None", layer.bias)
    # Only the last one has a bias: before a factor that pads, it would make the padding something else than zero.
    factors = [shape.build(layer, has_bias=shape is shapes[-1] and bias is not None) for shape in shapes]
    with torch.no_grad():
        weights = [torch.zeros(()) for _ in factors] if empty else way.weights(ranks)
        for factor, values in zip(factors, weights, strict=True):
            factor.weight.copy_(values)
        if bias is not None:
            factors[-1].bias.copy_(bias)
    trained = cast(Tensor, layer.weight).requires_grad
    return Factorized(*factors).train(layer.training).requires_grad_(trained)


def is_smaller(layer: nn.Module, method: Method, share: float) -> bool:
    """Whether the factors have fewer parameters and need fewer multiply-accumulates than the layer."""
    way = way_of(layer, method)
    return way.is_smaller(way.ranks(share))


def largest_share(layer: nn.Module, method: Method) -> float | None:
    """The largest share of the full rank at which the factors are smaller than the layer; None where there is none."""
    way = way_of(layer, method)
    shares = way.shares
    count = bisect_left(shares, True, key=lambda share: not way.is_smaller(way.ranks(share)))
    return shares[count - 1] if count else None


def share_keeping(layer: nn.Module, method: Method, energy: float) -> float | None:
    """The smallest share of the full rank that keeps so much of the layer's energy; None where only all of it does.

    Args:
        layer: Linear or a convolution without groups.
        method: How it is split.
        energy: Share of the sum of squared singular values, in (0, 1).
    """
    way = way_of(layer, method)
    shares = way.shares
    found = bisect_left(shares, energy, key=lambda share: way.kept(way.ranks(share)))
    return shares[found] if found < len(shares) else None


def why_whole(model: nn.Module, name: str) -> str | None:
    """The reason why a layer can't be factorized, None where it seems possible.

    Whether something else than a call of the layer reads its weight is for `factorizable` to find.
    """
    if reason := why_special(model, name):
        return reason
    layer: Any = model.get_submodule(name)
    if getattr(layer, "groups", 1) > 1:
        return f"it is a grouped convolution (groups={layer.groups}), whose weight is small already"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks, which its factors wouldn't run"
    return None


def factorizable(model: nn.Module, forward: Forward, method: Method = "tucker") -> dict[str, str]:
    """Every convolution and linear layer that is called, in order, and why it can't be factorized; ``""`` if it can.

    What seems possible is tried on a copy: each layer stands behind a no-op in a `Factorized`, so that the model must
    compute what it did, in evaluation and in training, unless something but a call reads the layer's attributes.

    Args:
        model: Is copied, not changed.
        forward: Runs a model on a batch of at least two example inputs and returns its output tensor.
        method: How convolutions are split.
    """
    found = {name: why_whole(model, name) or "" for name in execution_order(model, forward)}
    for name, reason in found.items():
        if not reason and largest_share(model.get_submodule(name), method) is None:
            found[name] = "it has no rank at which its factors are smaller"
    return found | _broken(model, forward, [name for name, reason in found.items() if not reason])


def _broken(model: nn.Module, forward: Forward, names: Sequence[str]) -> dict[str, str]:
    """The layers that can't be replaced, and why. All are tried at once; only where that fails the set is halved."""
    reason = _why_broken(model, forward, names) if names else None
    if reason is None:
        return {}
    if len(names) == 1:
        return {names[0]: reason}
    left, right = names[: len(names) // 2], names[len(names) // 2 :]
    found = _broken(model, forward, left) | _broken(model, forward, right)
    if not found:  # each half works without the other: the first one stays
        return dict.fromkeys(right, f"it can't be factorized together with {names[0]}: {reason}")
    return found | _broken(model, forward, [name for name in names if name not in found])


def _why_broken(model: nn.Module, forward: Forward, names: Sequence[str]) -> str | None:
    candidate = copy_of(model).eval()
    try:
        with torch.no_grad():
            before = forward(candidate)
            for name in names:
                replace_module(candidate, name, Factorized(nn.Identity(), candidate.get_submodule(name)))
            after = forward(candidate)
            forward(candidate.train())
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"it is read by something else than a call ({type(error).__name__}: {lines[0][:120] if lines else ''})"
    # A model may take another way through its kernels, which rounds differently; real differences are larger.
    close = before.shape == after.shape and torch.allclose(
        after, before, rtol=1e-2, atol=1e-3 * float(before.abs().max())
    )
    return None if close else "it is read by something else than a call: the model computes something else without it"
