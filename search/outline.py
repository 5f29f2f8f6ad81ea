"""What is known of a plan without training it, where it can be deployed at all."""

from __future__ import annotations

from paretune.errors import JobError, SearchError, TrialError
from paretune.objectives.evaluate import EARLY, Evaluator
from paretune.objectives.latency import Protocol
from paretune.spaces.plan import CompressionPlan


def outline(
    evaluator: Evaluator, plan: CompressionPlan, seed: int, protocol: Protocol = EARLY
) -> dict[str, float] | str:
    """What a plan costs, named as objectives are, or why it doesn't run; see `Evaluator.outline`."""
    try:
        return evaluator.outline(plan, seed=seed, protocol=protocol)
    except (JobError, SearchError, MemoryError):
        raise
    except TrialError as error:
        return str(error)
    except Exception as error:
        # Exporters and runtimes raise whatever they like for what they can't do, AssertionError and TypeError among it,
        # so that mistakes of our own can't be told from that: the error's kind in the reason shows them.
        return f"{type(error).__name__}: {error}"
