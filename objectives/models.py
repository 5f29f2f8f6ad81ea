"""Where the model comes from: a factory, a model zoo or a live object, and a file of weights."""

from __future__ import annotations

import importlib
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paretune.errors import JobError
from paretune.objectives.imports import call_factory, closest, import_string
from paretune.spaces.copies import copy_of

_ZOOS = ("timm", "torchvision")
_SHOWN = 3


@dataclass(frozen=True)
class ModelSource:
    """How to get a fresh model; building twice gives two that share nothing.

    Attributes:
        factory: An import string, ``timm:NAME``, ``torchvision:NAME``, a callable, or a module (which is
            copied).
        args: The factory's keyword arguments.
        weights: A state dictionary, ``.safetensors`` or ``.pt``/``.pth``; None keeps what the factory gives.
        key: What messages call it: the job's key.
    """

    factory: str | Callable[..., nn.Module] | nn.Module
    args: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    key: str = "model"

    def build(self) -> nn.Module:
        """Build the model on the CPU, with its weights, in evaluation mode, all parameters trainable.

        Raises:
            JobError: The factory can't be imported or fails, doesn't return a module, or the weights don't
                fit it.
        """
        try:
            model = self._construct()
            if not isinstance(model, nn.Module):
                remedy = "return a torch.nn.Module from it"
                raise JobError("model.factory", "must return a torch.nn.Module", type(model).__name__, remedy)
            if self.weights is not None:
                _load_into(model, Path(self.weights))
        except JobError as error:
            where = error.where.replace("model", self.key, 1)
            raise JobError(where, error.rule, error.got, error.remedy) from error
        # A frozen layer would be cut off from the tracing of dependencies, and couldn't recover from its pruning.
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return model.eval()

    def _construct(self) -> Any:
        factory: Any = self.factory
        if isinstance(factory, str):
            zoo, _, name = factory.partition(":")
            if zoo in _ZOOS:
                return _from_zoo(zoo, name, self.args)
            factory = import_string(factory, where="model.factory")
        if isinstance(factory, nn.Module):
            if self.args:
                raise JobError(
                    "model.args",
                    "must be empty for a module that is built already",
                    dict(self.args),
                    "remove them",
                )
            return copy_of(factory)
        if not callable(factory):
            got = f"{self.factory!r}, a {type(factory).__name__}"
            raise JobError("model.factory", "must be a function that returns a module", got, "name a function")
        return call_factory(factory, self.args, where="model")


def _from_zoo(zoo: str, name: str, args: Mapping[str, Any]) -> Any:
    try:
        package: Any = importlib.import_module("timm" if zoo == "timm" else "torchvision.models")
    except ModuleNotFoundError as error:
        if error.name == zoo:
            raise JobError(
                "model.factory",
                f"needs the package {zoo!r}",
                "no such package",
                f"pip install {zoo}, or use a factory of your own",
            ) from error
        raise _broken_zoo(zoo, error) from error
    # A build of torchvision for another torch raises RuntimeError ("operator torchvision::nms does not
    # exist").
    except Exception as error:
        raise _broken_zoo(zoo, error) from error
    known = package.list_models()
    # timm names may carry the tag of their weights after a dot.
    if name.partition(".")[0] not in known:
        raise JobError("model.factory", f"must name a model of {zoo}", repr(name), closest(name, known))
    create = package.create_model if zoo == "timm" else package.get_model
    try:
        return create(name, **args)
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise JobError("model", f"must be built without an error by {zoo}", got, "check model.args") from error


def _broken_zoo(zoo: str, error: Exception) -> JobError:
    remedy = f"install a {zoo} (and torchvision) built for torch {torch.__version__}"
    return JobError("model.factory", f"needs a {zoo!r} that imports", f"{type(error).__name__}: {error}", remedy)


def _load_into(model: nn.Module, path: Path) -> None:
    given = _read(path)
    own = model.state_dict()
    # safetensors stores tied tensors once: one name of each suffices.
    present = {tensor.data_ptr() for name, tensor in own.items() if name in given and tensor.numel()}
    missing = [name for name, tensor in own.items() if name not in given and tensor.data_ptr() not in present]
    unexpected = [name for name in given if name not in own]
    if missing or unexpected:
        got = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        )
        remedy = "save model.state_dict() of the model that the factory builds with model.args"
        raise JobError("model.weights", "must have exactly the keys of the model", got, remedy)
    for name, tensor in given.items():
        if tensor.shape != own[name].shape:
            got = f"{name} of shape {tuple(tensor.shape)}"
            rule = f"must have the shapes of the model, {tuple(own[name].shape)} here"
            raise JobError("model.weights", rule, got, "check model.args (e.g. the number of classes)")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise JobError("model.weights", "must be finite", f"NaN or infinity in {name}", "train the model again")
    model.load_state_dict(given, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        remedy = "train and save the model first, or correct the path (relative to the job file)"
        raise JobError("model.weights", "must be a file", f"{path}, which doesn't exist", remedy)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        remedy = "save model.state_dict() with safetensors.torch.save_file or torch.save"
        raise JobError("model.weights", "must end in .safetensors, .pt or .pth", path.name, remedy)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message tells users to switch the protection off.
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        got = f"{path} with {blocked[1] if blocked else 'something else'}"
        remedy = "save model.state_dict(), not the whole model: pickled code is never loaded"
        raise JobError("model.weights", "must hold tensors alone", got, remedy) from error
    except Exception as error:  # safetensors raises an exception class of its own, torch several.
        got = f"{path} ({type(error).__name__}: {error})"
        raise JobError("model.weights", "must be a readable file of weights", got, "save it again") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        got = (
            type(content).__name__
            if not isinstance(content, dict)
            else f"a dict with {', '.join(map(repr, list(content)[:5]))}"
        )
        raise JobError("model.weights", "must be a state dictionary, of tensors alone", got, "save model.state_dict()")
    return content
