"""An acceptance rule that adapts to the block: the threshold holds for what is accepted together.

The threshold rule of D2F bounds the doubt of each token, so that a step which accepts 64 tokens may
be 64 times as wrong as one that accepts a single one; its best value depends on the block size.
Here the threshold bounds the doubt of the whole set. By the union bound, the probability that all
of it is right is at least 1 minus the sum of the tokens' doubts (1 - confidence), however they
depend on each other; the same sum is the expected number of wrong tokens. The set is the largest
whose bound is above the threshold, so many sure tokens or a few less sure ones pass.

Related: the factor rule of Fast-dLLM (arXiv 2505.22618) takes the n surest tokens while
(n + 1)(1 - confidence of the n-th) < 1, which charges each of them for the least sure one;
Fast-dLLM++ (arXiv 2606.02955) charges each for itself, so that the set stays the most probable one;
the EB-Sampler (arXiv 2505.24857) bounds a sum of entropies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["JointThresholdPolicy"]


@dataclass(frozen=True, slots=True)
class JointThresholdPolicy:
    """Accept the largest set that is right altogether with more than a confidence.

    Never more than the threshold rule would at the same value, and the same where one proposal is
    left. A fully activated block takes at least its best one.
    """

    confidence_threshold: float

    def accept(
        self,
        masked: Sequence[int],
        confidence: Sequence[float],
        rank: Sequence[float],
        *,
        fully_activated: bool,
    ) -> Sequence[int]:
        """Return the surest offsets whose doubts add up to less than the threshold leaves."""
        passing: list[int] = []
        joint = 1.0
        for offset in sorted(masked, key=lambda offset: (-confidence[offset], offset)):
            joint -= 1.0 - confidence[offset]
            if joint <= self.confidence_threshold:
                break
            passing.append(offset)
        if passing or not fully_activated:
            return sorted(passing)
        return [max(masked, key=rank.__getitem__)]
