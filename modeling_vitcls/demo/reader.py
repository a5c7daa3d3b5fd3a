"""What the demo knows of a picture: the model's answer, and where its special tokens look.

    reader = Reader.load("someone/model", revision)
    reading = reader.read("cat.jpg")
    reading.answers                                  # {"Label": {"cat": 0.9, ...}}
    reading.drawn(token=0, layer=2, head=None)       # the picture with the map over it

The model comes through the Auto classes, so its code may be that of its repository. No page here: that is page.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import cached_file

from ..adaptation_vitcls import load_checkpoint
from ..analysis.maps import SeenPart, overlay, patch_maps, seen_part, token_names


MODEL_TYPE = "vitcls"
PICTURE_SIDE = 1024  # the longer side of a picture is kept at no more pixels, and shown with no fewer than
SMALLEST_SIDE = 384
THUMBNAIL_SIDE = 320

Answer = dict[str, float] | str  # label -> probability, or numbers in words


@dataclass(frozen=True)
class Reading:
    """What a model made of one picture.

    Attributes:
        picture: upright, at most `PICTURE_SIDE` pixels a side.
        seen: the part of it that the patches cover.
        answers: question -> answer, none of an encoder.
        rows: attention of the special tokens [layer, head, special token, key], float32; of no layer where it cannot
            be read.
        maps: its part that goes to patches [layer, head, special token, gh, gw].
    """

    picture: Image.Image
    seen: SeenPart
    answers: dict[str, Answer]
    rows: torch.Tensor
    maps: torch.Tensor

    def drawn(self, token: int, layer: int, head: int | None) -> Image.Image:
        """What a token looks at in a layer, over the picture. Head None: the mean of all."""
        return overlay(self.picture, chosen(self.maps[layer], head)[token], self.seen, min_side=SMALLEST_SIDE)

    def drawn_layers(self, token: int, head: int | None) -> list[Image.Image]:
        """The same in small for every layer; each map is as bright as its own largest value."""
        return [
            overlay(
                self.picture,
                chosen(maps, head)[token],
                self.seen,
                max_side=THUMBNAIL_SIDE,
                min_side=THUMBNAIL_SIDE // 2,
            )
            for maps in self.maps
        ]

    def shares(self, token: int, layer: int, head: int | None) -> list[float]:
        """What part of the token's attention goes to each special token, then to all patches together; 1 in sum."""
        row = chosen(self.rows[layer], head)[token]  # [key]
        special = row[: self.rows.shape[2]]
        return [*special.tolist(), 1 - special.sum().item()]


def chosen(heads: torch.Tensor, head: int | None) -> torch.Tensor:
    """One of the heads [head, ...], or their mean."""
    return heads.mean(dim=0) if head is None else heads[head]


@dataclass(frozen=True)
class Reader:
    """A model with all that is needed to ask it.

    Attributes:
        source: the folder or the id that it is from.
        commit: of the repository; None for a folder.
        code_revision: that was asked for, of the repository with the code.
    """

    model: Any
    processor: Any
    source: str
    commit: str | None
    code_revision: str | None
    is_classifier: bool

    @classmethod
    def load(cls, source: str, revision: str | None = None, code_revision: str | None = None) -> "Reader":
        """A vitcls checkpoint, as a classifier if it is one.

        Args:
            source: a folder, or a repository's id. Where this package is not installed, the code in the repository
                is run: pin a revision.
            revision: commit hash, branch or tag.
            code_revision: the same, where the code is in a repository of its own.

        Raises:
            ValueError, OSError: in one line, for other checkpoints, and what cannot be found or read.
        """
        commit = resolved(source, revision)
        settings = load_checkpoint(PreTrainedConfig.get_config_dict, source, revision=commit)[0]
        if (model_type := settings.get("model_type")) != MODEL_TYPE:
            raise ValueError(
                f"{source} holds a model of type {model_type!r}: give a {MODEL_TYPE!r} checkpoint (scripts/convert.py "
                "makes one of many others)"
            )
        options: dict[str, Any] = {"revision": commit, "trust_remote_code": True}
        options |= {"code_revision": code_revision} if code_revision else {}
        is_classifier = any("Classification" in name for name in settings.get("architectures") or ())
        auto_class: Any = AutoModelForImageClassification if is_classifier else AutoModel
        unused = {} if is_classifier else {"add_pooling_layer": False}
        model, info = load_checkpoint(
            auto_class.from_pretrained, source, output_loading_info=True, **options, **unused
        )
        if info["missing_keys"]:
            raise ValueError(f"the checkpoint {source} lacks {min(info['missing_keys'])}: train it first")
        processor = load_checkpoint(AutoImageProcessor.from_pretrained, source, **options)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        reader = cls(model.eval().to(device), processor, source, commit, code_revision, is_classifier)
        reader.check_can_show()
        return reader

    def check_can_show(self) -> None:
        """Raise ValueError for a model that the demo has nothing to say about."""
        if self.model.config.num_channels not in (1, 3):
            raise ValueError(
                f"{self.source} takes images of {self.model.config.num_channels} channels: none has these"
            )
        if not self.has_labels and not self.shows_attention:
            what = "attention that can be read" if self.merges_patches else "special tokens"
            raise ValueError(f"{self.source} has neither labels nor {what}, so there is nothing to show")

    @property
    def has_labels(self) -> bool:
        """Whether it says what a picture shows."""
        return self.is_classifier and bool(self.model.config.tasks or self.model.config.num_labels)

    @property
    def tokens(self) -> list[str]:
        """The special tokens, in words."""
        return token_names(self.model.config)

    @property
    def merges_patches(self) -> bool:
        """Whether patches become one on their way, so that their attention cannot be read."""
        return bool(getattr(self.model.config, "merged_patches_per_layer", 0))  # code of older repositories has none

    @property
    def shows_attention(self) -> bool:
        """Whether there is something to show of what tokens look at."""
        return bool(self.tokens) and not self.merges_patches

    @property
    def num_layers(self) -> int:
        """Layers of the encoder."""
        return self.model.config.num_hidden_layers

    @property
    def heads(self) -> list[str]:
        """The attention maps of a layer, in words; differential attention has two per head."""
        numbers = range(1, self.model.config.num_attention_heads + 1)
        if self.model.config.attention_type == "differential":
            return [f"head {number}, {which} map" for number in numbers for which in ("first", "second")]
        return [f"head {number}" for number in numbers]

    @property
    def questions(self) -> list[str]:
        """The names of the answers: one, or one per task."""
        if not self.has_labels:
            return []
        return list(self.model.config.task_labels()) or [kind_of_answer(self.model.config).title]

    @property
    def has_winner(self) -> bool:
        """Whether the first of the labels is the answer, rather than one of several or none."""
        return bool(self.model.config.tasks) or kind_of_answer(self.model.config).read is not several_labels

    @torch.inference_mode()
    def read(self, file: str | Path) -> Reading:
        """Ask the model about a picture.

        Raises:
            ValueError: in one line, for a file that is no picture, or one that the model cannot take.
        """
        config = self.model.config
        picture = self.processor.fetch_images(str(file))  # upright
        if config.num_channels == 1:
            picture = without_colour(picture)
        pixel_values = self.processor(picture, return_tensors="pt")["pixel_values"].to(self.model.device)
        answers: dict[str, Answer] = {}
        if self.has_labels:
            answers = answers_from(self.model(pixel_values).logits, config)
        rows = self.attention_to(pixel_values)
        height, width = pixel_values.shape[-2:]
        maps = patch_maps(rows, config, (height, width))
        left, top, right, bottom = seen_part(self.processor, picture.size[::-1], config.patch_height_width)
        small = picture.copy()
        small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        across, down = small.width / picture.width, small.height / picture.height
        seen = SeenPart(left * across, top * down, right * across, bottom * down)
        return Reading(small, seen, answers, rows, maps)

    def attention_to(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`Reading.rows` of one image [1, C, H, W]."""
        if self.merges_patches:
            rows, columns = self.model.base_model.embeddings.patch_embeddings.get_grid_size(pixel_values)
            num_tokens = self.model.config.token_layout.num_prefix_tokens + rows * columns
            return torch.empty(0, len(self.heads), len(self.tokens), num_tokens)
        return self.model.token_attention(pixel_values)[0].float().cpu()


def resolved(source: str, revision: str | None) -> str | None:
    """The hash of the commit that a repository's id and a revision stand for; None for a folder."""
    if Path(source).is_dir():
        return None
    file = load_checkpoint(cached_file, source, "config.json", revision=revision)
    return Path(file).parent.name  # the cache has a folder per commit


def without_colour(picture: Image.Image) -> Image.Image:
    """A grey picture as it is, another one as grey, with its transparency."""
    if picture.mode != "P" and len(picture.getbands()) < 3:
        return picture
    return picture.convert("LA" if picture.has_transparency_data else "L")


# Answers -------------------------------------------------------------------------------------------------------------


def one_label(logits: torch.Tensor, names: list[str]) -> Answer:
    """Logits [labels] -> probabilities, 1 in sum."""
    return dict(zip(names, logits.softmax(dim=0).tolist(), strict=True))


def several_labels(logits: torch.Tensor, names: list[str]) -> Answer:
    """Logits [labels] -> a probability for each on its own."""
    return dict(zip(names, logits.sigmoid().tolist(), strict=True))


def numbers(values: torch.Tensor, names: list[str]) -> Answer:
    """What a regression model says [labels]."""
    return ", ".join(f"{name}: {value:.4g}" for name, value in zip(names, values.tolist(), strict=True))


@dataclass(frozen=True)
class KindOfAnswer:
    """How logits are read, and what the answer is called."""

    title: str
    read: Callable[[torch.Tensor, list[str]], Answer]


KINDS_OF_ANSWER = {
    None: KindOfAnswer("Label", one_label),
    "single_label_classification": KindOfAnswer("Label", one_label),
    "multi_label_classification": KindOfAnswer("Labels, each with a probability of its own", several_labels),
    "regression": KindOfAnswer("Numbers", numbers),
}


def kind_of_answer(config: Any) -> KindOfAnswer:
    """That of a model with one label set; a single label is a yes or no, as in transformers' pipeline."""
    if config.num_labels == 1 and config.problem_type != "regression":
        return KINDS_OF_ANSWER["multi_label_classification"]
    return KINDS_OF_ANSWER[config.problem_type]


def answers_from(logits: Any, config: Any) -> dict[str, Answer]:
    """Logits of one picture, [1, labels] or such per task -> question -> answer."""
    if config.tasks:
        names_of_tasks = config.task_labels()
        return {task: one_label(logits[task][0].float().cpu(), names_of_tasks[task]) for task in names_of_tasks}
    kind = kind_of_answer(config)
    names = [config.id2label[index] for index in range(config.num_labels)]
    return {kind.title: kind.read(logits[0].float().cpu(), names)}
