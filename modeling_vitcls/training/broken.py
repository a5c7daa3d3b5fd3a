"""Counts and names pictures that cannot be read, and says when there are too many."""

from collections.abc import Callable, Iterable


NO_PICTURE = -1  # in a batch's `broken`: the picture is the one that the plan asked for


class BrokenPictures:
    """The tally of one run.

    Args:
        describe: the index of a broken picture -> what is wrong with it, in one line.
        warn: shows a line.
        limit: the run stops at more broken pictures than these (`--max-broken-images`).

    A run on several processes calls `note` on all of them with what all of them met: each then stops at the same step.
    """

    def __init__(self, describe: Callable[[int], str], warn: Callable[[str], None], limit: int) -> None:
        self.describe = describe
        self.warn = warn
        self.limit = limit
        self.known: set[int] = set()

    @property
    def count(self) -> int:
        """Different pictures that could not be read so far."""
        return len(self.known)

    def note(self, indices: Iterable[int]) -> None:
        """Take the values of a batch's `broken`, and name each picture the first time.

        Raises:
            ValueError: beyond the limit.
        """
        for index in indices:
            if index == NO_PICTURE or index in self.known:
                continue
            self.known.add(index)
            description = self.describe(index)
            self.warn(f"skipped an image: {description}")
            if self.count > self.limit:
                raise ValueError(
                    f"more than {self.limit} images cannot be read, the last one: {description} (mend or remove them, "
                    "or raise --max-broken-images)"
                )
