"""Which examples make up a step, and the seed of each sample: pure functions of (seed, step), so that resuming needs the step alone."""

import hashlib
import random
from collections.abc import Hashable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


class BatchPlan:
    """The order of the examples for ever; remembers the epoch it drew last, which changes the speed and nothing else."""

    def __init__(self, buckets: Sequence[Hashable], repeats: Sequence[int], batch_size: int, seed: int) -> None:
        """buckets[i] is the bucket of example i, and a batch never mixes two; repeats[i], above 0, is how often an epoch shows it."""
        self._members: dict[Hashable, list[int]] = {}
        for index, bucket in enumerate(buckets):
            self._members.setdefault(bucket, []).append(index)
        self._repeats = repeats
        self.batch_size = batch_size
        self._seed = seed
        self._drawn: tuple[int, list[tuple[int, ...]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        shown = (sum(self._repeats[index] for index in members) for members in self._members.values())
        return sum(-(-count // self.batch_size) for count in shown)

    def batch(self, step: int) -> tuple[int, ...]:
        """Indices of the examples of this step, counted from 0; fewer than the batch size only where a bucket ends."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._drawn[0] != epoch:
            self._drawn = (epoch, self._draw(epoch))
        return self._drawn[1][position]

    def _draw(self, epoch: int) -> list[tuple[int, ...]]:
        rng, ranks_rng = (random.Random(sample_seed(self._seed, epoch, 0, purpose)) for purpose in ("epoch", "ranks"))
        batches = []
        for members in self._members.values():
            # The passes follow one another before the cut into batches, so only the bucket's last batch can be short;
            # each is shuffled on its own, so of equal repeats an example comes again only after all the others.
            passes = spread(_shuffled(members, ranks_rng), self._repeats)
            order = [index for shown in passes for index in _shuffled(sorted(shown), rng)]
            batches += [tuple(order[start : start + self.batch_size]) for start in range(0, len(order), self.batch_size)]
        return _shuffled(batches, rng)


def spread(members: Sequence[int], repeats: Sequence[int]) -> list[list[int]]:
    """As many passes over the members as the largest of their repeats; a member with fewer is in that many of them, evenly apart.

    Members of equal repeats take turns in their order, so that passes come out equally long: no set of pictures ends before another.
    """
    most = max(repeats[index] for index in members)
    alike: dict[int, list[int]] = {}
    for index in members:
        alike.setdefault(repeats[index], []).append(index)
    passes: list[list[int]] = [[] for _ in range(most)]
    for times, group in alike.items():
        for rank, index in enumerate(group):
            # How often before pass p: p * times / most, begun rank / len(group) of the way to the first showing, rounded down.
            before = [(number * times * len(group) + rank * most) // (most * len(group)) for number in range(most + 1)]
            for number in range(most):
                if before[number + 1] > before[number]:
                    passes[number].append(index)
    return passes


def sample_seed(seed: int, step: int, position: int, purpose: str) -> int:
    """A seed in 0 .. 2**63 - 1 for the sample at `position` of the step's batch, unrelated for each purpose (noise, caption ...)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{position}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _shuffled(items: Sequence[Item], rng: random.Random) -> list[Item]:
    """By random(), whose sequence Python promises to keep between versions; it does not promise that of shuffle()."""
    return sorted(items, key=lambda _: rng.random())
