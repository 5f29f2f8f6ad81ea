"""What can go wrong, by what it means for the work at hand.

Every message states the rule, then the value that broke it, then the remedy.
"""

from __future__ import annotations


class ParetuneError(Exception):
    """Root of every error that paretune raises on purpose."""


class JobError(ParetuneError):
    """The job (its keys, model, data or target) is wrong; raised before anything is spent. Exit code 2.

    Args:
        where: The job key or input at fault, e.g. ``"space.max_ratio"``.
        rule: What must hold, as a phrase that follows `where`, e.g. ``"must be in [0, 1)"``.
        got: The value that broke the rule.
        remedy: What to do about it.
    """

    def __init__(self, where: str, rule: str, got: object, remedy: str) -> None:
        super().__init__(f"{where} {rule}, but got {got}; {remedy}")
        self.where = where
        self.rule = rule
        self.got = got
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[JobError], tuple[str, str, object, str]]:
        # Exceptions pickle as their class and args; args hold the text alone, and workers send errors home.
        return type(self), (self.where, self.rule, self.got, self.remedy)


class TrialError(ParetuneError):
    """This trial failed (non-finite loss, a layer executed in another width, ...); the search goes on."""


class SearchError(ParetuneError):
    """The search as a whole can't go on, or found nothing feasible. Exit code 1."""
