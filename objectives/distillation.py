"""What a teacher gives: its outputs, an ensemble's, and hints, the features of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from paretune.errors import JobError, TrialError
from paretune.objectives.accelerator import memory_budget
from paretune.objectives.data.inputs import Inputs, call, tensors
from paretune.objectives.data.splits import MEMORY_LIMIT_BYTES, Batch, Splits
from paretune.objectives.imports import closest
from paretune.objectives.tasks import Task

_RIDGE = 1e-3
"""Of the first fit of a regressor, as a share of the mean variance of the features that it reads: enough for a batch
with no more samples than channels."""

_POSITIONS = 2**14
"""Positions of a batch's features that the first fit of a regressor looks at, at most."""

_POOLS: tuple[Callable[[Tensor, Any], Tensor], ...] = (
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
)
_CHANNELS_FIRST = (_ConvNd, _NormBase, nn.GroupNorm)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)
"""Layers whose outputs show which axis has the channels: axis 1, and the last one."""


class Ensemble(nn.Module):
    """Several models that teach as one; of a single one, the outputs stay as they are.

    Args:
        models: At least one; all take the same inputs.
        combine: Makes one output of theirs, usually `Task.ensemble`.
    """

    def __init__(self, models: Sequence[nn.Module], combine: Callable[[Sequence[Tensor]], Tensor]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self._combine = combine

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """The combined outputs of all models for the same inputs."""
        outputs: list[Tensor] = [model(*inputs, **named) for model in self.models]
        return outputs[0] if len(outputs) == 1 else self._combine(outputs)


class Teacher:
    """Gives the teacher's outputs for training batches, computing those of unaugmented samples only once.

    It computes, and keeps its outputs, on the device of the inputs; the model is moved there at the first call. What is
    kept is computed in float32, as all trials read it; all else in the caller's mixed precision.

    Args:
        model: A model, or an `Ensemble`; is put in eval mode.
        samples: Length of the training split.
        cached: Whether a sample's inputs are the same every time. Outputs that would take more than 2 GiB, or half of
            what is left of a GPU's memory, are computed anew each time all the same.
    """

    def __init__(self, model: nn.Module, samples: int, *, cached: bool) -> None:
        self._model = model.eval()
        self._samples = samples
        self._cached = cached
        self._device: torch.device | None = None
        self._outputs: Tensor | None = None
        self._known: Tensor | None = None

    @torch.no_grad()
    def __call__(self, indices: Tensor, inputs: Inputs) -> Tensor:
        """Outputs for a batch; `indices`, on the CPU, are its samples' positions in the training split."""
        if not self._cached:
            return self._compute(inputs)
        if self._outputs is None or self._known is None or not bool(self._known[indices].all()):
            outputs = self._compute(inputs)
            if self._outputs is None or self._known is None:
                limit = min(MEMORY_LIMIT_BYTES, memory_budget(outputs.device))
                if self._samples * outputs[0].numel() * 4 > limit:
                    self._cached = False
                    return outputs
                self._outputs = outputs.new_zeros((self._samples, *outputs.shape[1:]))
                # On the CPU, as the indices are: a look at it mustn't wait for a GPU.
                self._known = torch.zeros(self._samples, dtype=torch.bool)
            self._outputs[indices.to(outputs.device, non_blocking=True)] = outputs
            self._known[indices] = True
        return self._outputs[indices.to(self._outputs.device, non_blocking=True)]

    def _compute(self, inputs: Inputs) -> Tensor:
        device = next(iter(tensors(inputs).values())).device
        if device != self._device:
            self._model.to(device)
            self._device = device
        with torch.autocast(device.type, enabled=False) if self._cached else nullcontext():
            return call(self._model, inputs).float()


class Hints:
    """Layers whose features a student is to follow (FitNets: Romero et al., 2015, arXiv:1412.6550).

    Compression keeps the names of layers: what is pruned, factorized, quantized or had batch norm folded into it is
    still found in its place. A linear map from the student's channels to the teacher's is learnt along, so that a
    student with fewer channels can follow.

    Args:
        teacher: Is put in eval mode, and moved to the device of the batches.
        layers: Names that hold in both models, or the student's names to the teacher's.
    """

    def __init__(self, teacher: nn.Module, layers: Sequence[str] | Mapping[str, str]) -> None:
        self.teacher = teacher.eval()
        self.layers = dict(layers) if isinstance(layers, Mapping) else {name: name for name in layers}

    def attach(self, student: nn.Module, batch: Batch, *, role: str = "the model") -> AttachedHints:
        """Start to follow a student's layers; close what comes back when its training is over.

        The student's parameters, buffers and modes stay as they are, and no random number is drawn.

        Args:
            student: On the device of the batch.
            batch: Shows the shapes of the features.
            role: What messages call the student.

        Raises:
            JobError: A layer isn't there, doesn't run, or its features can't be compared.
        """
        self.teacher.to(batch.targets.device)
        with _evaluating(student), torch.no_grad():
            read = _features(student, self.layers, batch.inputs, role)
        with _noting_sources(self.teacher, self.layers.values()) as outputs:
            taught = self.taught(batch.inputs)
        regressors = {}
        for name, source in self.layers.items():
            _check_features(f"{name} of {role}", read[name], batch)
            _check_features(f"{source} of the teacher", taught[source], batch)
            if read[name].ndim != taught[source].ndim:
                got = f"{name} with {tuple(read[name].shape)} for {source} with {tuple(taught[source].shape)}"
                raise _refusal("must pair features with as many axes", got, "pair other layers")
            axis = _channel_axis(read[name], taught[source], outputs.get(source))
            if axis is None:
                got = f"{source} of the teacher with {tuple(taught[source].shape)}"
                remedy = "name a convolution, normalization or linear layer within it or before it"
                raise _refusal("must name layers whose channels can be told from positions", got, remedy)
            channels = read[name].shape[axis], taught[source].shape[axis]
            regressors[name] = _Regressor(*channels, axis, device=batch.targets.device)
        return AttachedHints(self, student, regressors)

    @torch.no_grad()
    def taught(self, inputs: Inputs) -> dict[str, Tensor]:
        """The teacher's features, by its layers' names."""
        return _features(self.teacher, self.layers.values(), inputs, "the teacher")


class _Regressor(nn.Module):
    """A linear map from a student's channels to the teacher's, fitted to the first features that it sees.

    A random map would pull a student that is already trained away from where it is. So would one that was fitted in
    eval mode: the batch norm of a net that has just been pruned gives other features in training mode.

    Args:
        read: Channels of the student.
        wanted: Channels of the teacher.
        axis: Of the channels, in the features of both.
        device: Of both.
    """

    def __init__(self, read: int, wanted: int, axis: int, *, device: torch.device) -> None:
        super().__init__()
        self._axis = axis
        self.linear = nn.Linear(read, wanted, device="meta").to_empty(device=device)  # draws no random number
        self._moments: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def forward(self, read: Tensor, wanted: Tensor) -> Tensor:
        """Mean squared error of a student's features from a teacher's, in units of the variance of the first ones."""
        read, wanted = _paired(read, wanted, self._axis)
        # Standardised, as steps of an optimizer such as AdamW have one size, whatever that of the features.
        if self._moments is None:
            self._moments = _moments(read.detach()), _moments(wanted)
            with torch.no_grad():
                _fit(self.linear, *(_standardised(*pair) for pair in zip((read, wanted), self._moments, strict=True)))
        ours, theirs = self._moments
        return F.mse_loss(self.linear(_standardised(read, ours)), _standardised(wanted, theirs))


class AttachedHints:
    """Hints that follow one student; the training asks for the loss after each forward pass.

    Args:
        hints: Teacher and layers.
        student: Gets hooks, until `close`.
        regressors: By the student's layers' names.
    """

    def __init__(self, hints: Hints, student: nn.Module, regressors: Mapping[str, _Regressor]) -> None:
        self._hints = hints
        self._regressors = regressors
        self._read: dict[str, Tensor] = {}
        # What a forward pass that failed has left would hold on to its whole graph.
        self._handles = [student.register_forward_pre_hook(lambda *_: self._read.clear())]
        self._handles += _note(student, regressors, self._read)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is to be trained along with the student; its first values come with the first loss."""
        for regressor in self._regressors.values():
            yield from regressor.parameters()

    def loss(self, part: Batch) -> Tensor:
        """How far the student's features are from the teacher's, the mean over layers; a scalar with gradient.

        Mean squared errors are divided by the variance of the teacher's features in the first part that was seen: 1 is
        a student whose features say nothing, and deep layers count as much as early ones. The teacher runs in the
        caller's mixed precision; all else is float32.

        Args:
            part: What the student has just been run on.

        Raises:
            TrialError: One of the layers wasn't called.
        """
        for name in self._regressors.keys() - self._read:
            raise TrialError(f"layers with hints must run in every training step, but {name} didn't; name other layers")
        taught = self._hints.taught(part.inputs)
        with torch.autocast(part.targets.device.type, enabled=False):
            losses = [
                regressor(self._read.pop(name), taught[self._hints.layers[name]])
                for name, regressor in self._regressors.items()
            ]
            return torch.stack(losses).mean()

    def close(self) -> None:
        """Take the hooks off the student."""
        for handle in self._handles:
            handle.remove()
        self._read.clear()


def check_teaching(
    model: nn.Module,
    teachers: Sequence[nn.Module],
    splits: Splits,
    task: Task,
    hints: Sequence[str] | Mapping[str, str],
    *,
    role: str = "the model",
) -> None:
    """See before anything is spent that the teachers fit together, and to the model.

    Args:
        model: That is compressed, on the CPU.
        teachers: At least one; the first gives the hints.
        splits: Two samples of `train` are tried.
        task: Compares the outputs.
        hints: Layers, see `Hints`.
        role: What messages call the model, e.g. ``model.variants.slim``.

    Raises:
        JobError: Something of it doesn't fit.
    """
    batch = next(splits.train.head(2).batches(2))
    with torch.no_grad():
        outputs = [call(net.eval(), batch.inputs) for net in (model, *teachers)]
        try:
            taught = outputs[1] if len(teachers) == 1 else task.ensemble(outputs[1:])
            task.distillation_loss(outputs[0], taught, 1.0)
        except Exception as error:
            got = f"{' and '.join(str(tuple(found.shape)) for found in outputs[1:])} for {tuple(outputs[0].shape)}"
            remedy = f"name teachers of the same task ({error})"
            raise JobError("teacher", "must give outputs that compare with the model's", got, remedy) from error
    if hints:
        Hints(teachers[0], hints).attach(model, batch, role=role).close()


def _note(
    model: nn.Module, names: Iterable[str], into: dict[str, Tensor], role: str = "the model"
) -> list[RemovableHandle]:
    """Hooks that put the layers' outputs into a dictionary; a layer that is called twice gives the last."""
    known = dict(model.named_modules(remove_duplicate=False))

    def hook(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # A copy: what comes next may work in place, as many a ReLU does.
            into[name] = output.clone() if isinstance(output, Tensor) else output

        return note

    for name in names:
        if name not in known:
            remedy = closest(name, filter(None, known))  # the model itself has the name ""
            if role.startswith("model.variants"):
                remedy += " (name layers that all variants have)"
            raise _refusal(f"must name layers of {role}", repr(name), remedy)
    return [known[name].register_forward_hook(hook(name)) for name in names]


def _features(model: nn.Module, names: Iterable[str], inputs: Inputs, role: str) -> dict[str, Tensor]:
    """The outputs of the layers for these inputs."""
    found: dict[str, Tensor] = {}
    handles = _note(model, names, found, role)
    try:
        call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if name not in found:
            got = f"{name!r}, which isn't called"
            raise _refusal(f"must name layers that {role} runs", got, "name one that is called in forward")
    return found


def _check_features(name: str, features: Any, batch: Batch) -> None:
    if not isinstance(features, Tensor):
        got, remedy = f"{name} with {type(features).__name__}", "name a layer within it"
        raise _refusal("must name layers that return one tensor", got, remedy)
    if not 2 <= features.ndim <= 5 or len(features) != len(batch.targets) or not features.is_floating_point():
        got = f"{name} with {tuple(features.shape)} {features.dtype} for {len(batch.targets)} samples"
        rule = "must name layers with float features (N, C), (N, L, C) or (N, C, ...) for N samples"
        raise _refusal(rule, got, "name other layers")


def _refusal(rule: str, got: str, remedy: str) -> JobError:
    return JobError("finetune.hints", rule, got, remedy)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, so that no running statistics move; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Source(NamedTuple):
    """The output of a layer that shows which axis has the channels."""

    axis: int
    shape: torch.Size


@contextmanager
def _noting_sources(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, _Source]]:
    """Within the block, each run of the model notes what was the last such output when each of the layers was done."""
    known = dict(model.named_modules(remove_duplicate=False))
    latest: list[_Source] = []
    found: dict[str, _Source] = {}

    def see(layer: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            latest[:] = [_Source(1 if isinstance(layer, _CHANNELS_FIRST) else output.ndim - 1, output.shape)]

    def done(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            if latest:
                found[name] = latest[0]

        return note

    layers = [layer for layer in model.modules() if isinstance(layer, _CHANNELS_FIRST + _CHANNELS_LAST)]
    handles = [layer.register_forward_hook(see) for layer in layers]
    handles += [known[name].register_forward_hook(done(name)) for name in names if name in known]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _channel_axis(read: Tensor, wanted: Tensor, source: _Source | None) -> int | None:
    """The axis of the channels, 1 or the last one, in a student's features and a teacher's; None where it's not known.

    Args:
        read: The student's.
        wanted: The teacher's, with as many axes.
        source: Where the teacher's last came from. What comes after it may have moved its axes.
    """
    axes = {1, wanted.ndim - 1}
    if source is not None:
        fitting = {axis for axis in axes if wanted.shape[axis] == source.shape[source.axis]}
        axes = fitting or axes
    if len(axes) == 1:
        return axes.pop()
    different = [axis for axis in range(1, wanted.ndim) if read.shape[axis] != wanted.shape[axis]]
    if len(different) == 1 and different[0] in axes:
        return different[0]
    return source.axis if source is not None and len(source.shape) == wanted.ndim else None


def _paired(read: Tensor, wanted: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """A student's features and a teacher's as (positions..., channels) in float32, with as many positions."""
    read, wanted = read.movedim(axis, 1).float(), wanted.movedim(axis, 1).float()
    if read.shape[2:] != wanted.shape[2:]:
        pool = _POOLS[read.ndim - 3]
        sides = [min(lengths) for lengths in zip(read.shape[2:], wanted.shape[2:], strict=True)]
        read, wanted = pool(read, sides), pool(wanted, sides)
    return read.movedim(1, -1), wanted.movedim(1, -1)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel's mean, and one standard deviation of all channels; 1 where nothing varies."""
    mean = features.flatten(0, -2).mean(0)
    deviation = (features - mean).square().mean().sqrt()
    return mean, torch.where(deviation > 0, deviation, 1.0)


def _standardised(features: Tensor, moments: tuple[Tensor, Tensor]) -> Tensor:
    mean, deviation = moments
    return (features - mean) / deviation


def _fit(linear: nn.Linear, read: Tensor, wanted: Tensor) -> None:
    """Make it the map of least squares, with a little ridge, between standardised features."""
    step = max(1, read[..., 0].numel() // _POSITIONS)
    # In float64: a GPU may multiply float32 with 10 bits of mantissa, and squares of close features need more.
    rows, goals = (features.flatten(0, -2)[::step].double() for features in (read, wanted))
    gram = rows.T @ rows
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
    # Features that aren't finite give a map that isn't; the training's own check of the loss names that.
    weight, _ = torch.linalg.solve_ex(gram, rows.T @ goals)
    linear.weight.copy_(weight.T)
    linear.bias.zero_()  # both have mean 0
