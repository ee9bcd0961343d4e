"""Who is looked at first: a site's rule for the order of its unread studies.

Rules:
- Declined studies rank above category 3 whatever the rule (clinical safety 4): a site can only lift them further.
- A study that is stuck without an answer ranks like a declined one: nobody has looked at it.
- The rule orders; it hides nothing, and it changes neither an answer nor an alarm: whether a category `fell` is
  the same at every site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from busgen_cds.birads import Category, severity

Order = Literal["suspicion", "arrival"]
Answer = tuple[str, Category | None]  # its outcome, and its category
LAST = 1.0  # not for us: nobody waits for it


@dataclass(frozen=True)
class Rule:
    order: Order = "suspicion"
    declined_above: Category = "3"

    def place(
        self, outcome: str, birads: Category | None = None, probability: float | None = None, *, stuck: bool = False
    ) -> float:
        """Where a study stands, the smaller the sooner; equal ones stand by who has waited longest.

        By suspicion, each category is a group, ordered by probability. By arrival there are at most four groups:
        what ranks above the unseen (declined, or stuck without an outcome), the unseen, the rest above category 3,
        then 3 and nothing found.
        """
        if outcome == "not-for-us":
            return LAST
        if outcome == "declined" or (stuck and not outcome):
            return -self._unseen
        rank = 2.0 * severity(birads)
        if self.order == "suspicion":
            return -rank - (probability or 0.0)
        return -self._unseen - 1 if rank > self._unseen else -2.0 * severity("4A") if rank > 2 else 0.0

    @property
    def _unseen(self) -> float:
        return 2.0 * severity(self.declined_above) + 1.5  # above the last probability of the category below

    @property
    def key(self) -> str:
        """Two rules with one key give every study the same place."""
        return f"{self.order} {self.declined_above} v1"

    @property
    def words(self) -> str:
        """As the page says it."""
        first = (
            "Most suspicious first" if self.order == "suspicion" else "First come, first read; 3 and no lesion after"
        )
        return f"{first}; not analysed above {self.declined_above}"


def fell(before: Answer, after: Answer) -> bool:
    """Whether what replaces an answer ranks lower: by category alone, declined above 3. Nothing found is the lowest."""
    return _rank(after) > _rank(before)


def _rank(answer: Answer) -> float:
    return min(0.0, Rule().place(*answer))
