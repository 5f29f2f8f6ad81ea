"""The data of a job: three splits of inputs and targets, in memory or streamed."""

from paretune.objectives.data.inputs import Inputs, call, map_tensors
from paretune.objectives.data.loading import load_splits
from paretune.objectives.data.splits import Batch, Split, Splits, StreamSplit

__all__ = ["Batch", "Inputs", "Split", "Splits", "StreamSplit", "call", "load_splits", "map_tensors"]
