"""The page about photos without labels, for `predict --review`: a collection that a person labels in rounds.

    predict --answers ... --review page.html -> clicks -> answers.csv -> finetune --answers ... -> predict ...

It has the photos that the model is least sure about, some that look unknown, and a quarter that is drawn
at random by content: the same command shows the same photos, and a later round shows others.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from accelerate import PartialState

from ..conversion.open_model import open_model
from ..data.answers import RANDOM, read_answers
from ..data.images import HARD, decode_image, to_encoded_image
from ..inference.inputs import open_input
from ..inference.options import PredictOptions
from ..inference.output_table import SUMMARY
from ..inference.prediction_rows import Row
from .labels_page import write_labels_page
from .wrong_photos import draw_photo


def write_review(file: Path, options: PredictOptions, rows: Sequence[Row]) -> None:
    """Choose photos without an answer that did not train the model, draw them, and write the page.

    Args:
        file: the page.
        options: of the command: the model, the photos, how many of them are shown, and the answers.
        rows: what the model says of each photo.
    """
    if not PartialState().is_main_process:
        return
    table = pd.DataFrame(rows, columns=SUMMARY).dropna(subset=["probability", "checksum"])
    if options.answers:
        table = table[~table["checksum"].isin(read_answers(options.answers).index)]
    # The order of checksums is a random one
    table = table[table["trained"] != True].drop_duplicates("checksum").sort_values("checksum")  # noqa: E712
    num_drawn = options.review_count // 4
    drawn, rest = table[:num_drawn], table[num_drawn:].sort_values("probability")
    unknown = rest[rest["unknown"] == True][:num_drawn]  # noqa: E712
    unsure = rest.drop(unknown.index)[: options.review_count - num_drawn - len(unknown)]
    parts = zip((drawn, unsure, unknown), (RANDOM, *HARD), strict=True)
    asked = pd.concat(part.assign(chosen=kind) for part, kind in parts).to_dict("records")

    records, _ = open_input(options)
    folder = open_model(options.model)
    processor = folder.load_processor()
    photos = []
    for row in asked:
        encoded = to_encoded_image(records[row["index"]].content, Path())
        picture = draw_photo(decode_image(encoded, row["image"]), processor.bit_depth)
        photos.append(row | {"prediction": row["label"], "label": "", "picture": picture})
    write_labels_page(file, photos, [*folder.config.id2label.values()])
