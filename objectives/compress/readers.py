"""Who reads what a layer computes, found in the autograd graph: any forward can be asked, no tracing is needed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paretune.spaces.graph import Forward

Node = Any
"""A node of the autograd graph (`grad_fn`)."""


@dataclass(frozen=True)
class Readers:
    """One run of a model, as its autograd graph.

    Attributes:
        outputs: Module to the node that made its output.
        inputs: Module to the node that made its (first) input.
        calls: How often each module was called.
        readers: Node to those that read its result, once for each time, on the way to the model's output.
    """

    outputs: dict[str, Node]
    inputs: dict[str, Node]
    calls: Counter[str]
    readers: dict[Node, list[Node]]

    def only_reader(self, module: str) -> Node | None:
        """The operation that alone reads a module's output; None where several do, or the module is called again."""
        found = self.readers.get(self.outputs.get(module), [])
        return found[0] if len(found) == 1 and self.calls[module] == 1 else None


def trace_readers(model: nn.Module, forward: Forward, kinds: tuple[type[nn.Module], ...]) -> Readers:
    """Run `model` (made trainable) and watch its modules of these kinds."""
    outputs: dict[str, Node] = {}
    inputs: dict[str, Node] = {}
    calls: Counter[str] = Counter()
    names = {module: name for name, module in model.named_modules() if isinstance(module, kinds)}

    def before(module: nn.Module, given: tuple[Any, ...]) -> None:
        calls[names[module]] += 1
        inputs[names[module]] = getattr(given[0], "grad_fn", None)

    def after(module: nn.Module, _given: Any, output: Tensor) -> None:
        outputs[names[module]] = output.grad_fn

    handles = [module.register_forward_pre_hook(before) for module in names]
    handles += [module.register_forward_hook(after) for module in names]
    try:
        with torch.enable_grad():
            for parameter in model.parameters():
                parameter.requires_grad_(True)
            root = forward(model).grad_fn
    finally:
        for handle in handles:
            handle.remove()
    return Readers(outputs, inputs, calls, _readers(root))


def _readers(root: Node) -> dict[Node, list[Node]]:
    found: dict[Node, list[Node]] = {}
    stack, seen = [root], {root}
    while stack:
        reader = stack.pop()
        for node, _ in reader.next_functions:
            if node is None:
                continue
            found.setdefault(node, []).append(reader)
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return found
