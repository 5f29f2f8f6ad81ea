"""A kernel that scikit-learn lacks."""

from __future__ import annotations

from typing import Any

from sklearn.gaussian_process.kernels import Kernel


class Columns(Kernel):  # type: ignore[misc]  # scikit-learn isn't annotated
    """Another kernel on some of the columns.

    Args:
        kernel: Sees these columns alone.
        start: The first of them.
        stop: The first that isn't.
    """

    def __init__(self, kernel: Kernel, start: int, stop: int) -> None:
        self.kernel = kernel
        self.start = start
        self.stop = stop

    @property
    def hyperparameters(self) -> list[Any]:
        """Of the other kernel."""
        found: list[Any] = self.kernel.hyperparameters
        return found

    @property
    def theta(self) -> Any:
        """Of the other kernel."""
        return self.kernel.theta

    @theta.setter
    def theta(self, theta: Any) -> None:
        self.kernel.theta = theta

    @property
    def bounds(self) -> Any:
        """Of the other kernel."""
        return self.kernel.bounds

    def __call__(self, X: Any, Y: Any = None, eval_gradient: bool = False) -> Any:  # noqa: N803 - scikit-learn's names
        others = None if Y is None else Y[:, self.start : self.stop]
        return self.kernel(X[:, self.start : self.stop], others, eval_gradient=eval_gradient)

    def diag(self, X: Any) -> Any:  # noqa: N803
        """Of the other kernel."""
        return self.kernel.diag(X[:, self.start : self.stop])

    def is_stationary(self) -> bool:
        """As the other kernel is."""
        return bool(self.kernel.is_stationary())

    def __repr__(self) -> str:
        return f"Columns({self.kernel}, {self.start}, {self.stop})"
