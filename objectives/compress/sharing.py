"""Weight sharing: each layer's weights take the values of a codebook (Han et al., 2016, arXiv:1510.00149).

It makes the artifact smaller, not faster: kernels multiply the values as they are. The weights of a cluster are trained
as one, see `paretune.objectives.compress.ties`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from paretune.objectives.compress.ties import weights_of
from paretune.spaces.plan import Sharing

if TYPE_CHECKING:
    from paretune.objectives.compress import Context

Array = np.ndarray[Any, Any]

_BINS = 2**14
"""Of the histogram that stands for a layer's weights: k-means on millions of them would take minutes."""


def share_weights(model: nn.Module, config: Sharing, context: Context, _fraction: float = 1.0) -> nn.Module:
    """Put each weight on the nearest value of its layer's codebook, in place; a factor has a codebook of its own.

    Zeros stay zero, and are one of the values: a sparse layer stays as sparse as it is. One scale for a whole layer
    maps equal weights to equal levels, so a layer that is quantized per tensor afterwards has no more values either.

    Args:
        model: On the CPU, batch norm folded, not quantized yet.
        config: Sizes of the codebooks. A layer with no more values than that stays as it is.
        context: Without batches nothing is done, as the weights will be loaded.

    Raises:
        TrialError: A layer has no weight.
    """
    for name, clusters in config.clusters.items():
        for weight in weights_of(model, name):
            if context.batches:
                _share(weight, clusters)
    return model


@torch.no_grad()
def _share(weight: Tensor, clusters: int) -> None:
    rest = weight != 0
    values = weight[rest].numpy()
    if len(values) < weight.numel():
        clusters -= 1
    if len(values):
        weight[rest] = torch.from_numpy(_clustered(values, clusters))


def _clustered(values: Array, clusters: int) -> Array:
    """Each value's nearest of so many centres, which are the means of what is nearest to them."""
    centres = np.sort(_centres(values, clusters))
    index = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
    sizes = np.bincount(index, minlength=clusters)
    means = np.bincount(index, weights=values, minlength=clusters) / np.maximum(sizes, 1)
    found: Array = means.astype(values.dtype)[index]
    return found


def _centres(values: Array, clusters: int) -> Array:
    """Centres by k-means on a histogram of the values, from evenly spaced ones over their range (Han et al., 2016)."""
    from sklearn.cluster import KMeans  # takes a second to import

    sizes, _ = np.histogram(values, _BINS)
    sums, _ = np.histogram(values, _BINS, weights=values.astype(np.float64))
    used = sizes > 0
    points = (sums[used] / sizes[used])[:, None]
    if len(points) <= clusters:  # few values, or a far one beside which the others seem equal
        distinct = np.unique(values)
        return distinct if len(distinct) <= clusters else np.asarray(points[:, 0])
    start = np.linspace(values.min(), values.max(), clusters, dtype=np.float64)[:, None]
    # The tolerance is relative to the variance: the default ends before a codebook of many values has settled.
    means = KMeans(clusters, init=start, n_init=1, tol=0).fit(points, sample_weight=sizes[used])
    return np.asarray(means.cluster_centers_[:, 0])
