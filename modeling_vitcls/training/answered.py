"""What the answers of a person (data/answers.py) mean for the result of a run.

Photos that a person was asked about because a model was unsure are harder than others: they train the
classifier, and do not measure it. In three rounds of a collection, the interval of all photos contained the
accuracy on others in 6 of 36 cases, and the interval without them in 36. A label that was corrected counts
like any other, unless the person believed the model: of 300 photos, 30 wrong labels then became 48, the
estimate rose from 69 to 89 %, and the accuracy on others fell from 86 to 84 %.
"""

import numpy as np

from ..data.answers import CHANGED, CONTRADICTED, HARD, RANDOM
from ..frozen.heads import FrozenHead
from ..inference.metrics import MetricValues, drop_intervals


MIN_ANSWERS = 10
# Part of the contradicted labels that are changed, from which a person believes the classifier. With a tenth of the
# labels wrong, 43 % of 60 are; with three tenths, 82 %. What later classifiers say of these photos tells nothing.
BELIEVED_PART = 0.95


def judge_answers(head: FrozenHead, metrics: MetricValues) -> str | None:
    """Say which photos do not measure a cross-validated classifier, and mark in its metrics who does.

    `is_drawn`: all of them were drawn at random from a collection. `no_estimate`: why there is no estimate.
    """
    probe = head.probe
    features = head.features.take(slice(len(probe.losses_)))
    chosen = features.chosen
    if chosen is None or head.held_out is not None:
        return None

    num_changed = int((chosen == CHANGED).sum())
    num_disputed = int(np.isin(chosen, (CHANGED, CONTRADICTED)).sum())
    if num_disputed >= MIN_ANSWERS and num_changed >= BELIEVED_PART * num_disputed:
        metrics["no_estimate"] = (
            f"{num_changed:,} of {num_disputed:,} labels that a classifier contradicted were changed, and whoever "
            "believes it makes it look better than it is. Answer by what the photos show, or evaluate photos that "
            "nobody has corrected"
        )
    if np.isin(chosen[probe.is_counted_], HARD).any():  # There are no others
        metrics["no_estimate"] = (
            "a model was unsure about all of these photos, so they are harder than others. Look at photos that "
            "are drawn at random, or evaluate others"
        )
    if "no_estimate" in metrics:
        drop_intervals(metrics)
    metrics["is_drawn"] = bool((chosen == RANDOM)[probe.is_counted_].all())
    num_hard = int((~probe.is_counted_).sum())
    if not num_hard:
        return None
    return (
        f"{num_hard:,} photos train the classifier and do not measure it, because a model was unsure about them: "
        "they are harder than others"
    )
