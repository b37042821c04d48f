"""`ImagesRecipe`: image classification with a ViT, as a typed, frozen config."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import DataError, RecipeError
from trimtab.models.vit import ViT, ViTConfig
from trimtab.tasks.images.augment import Augment, augmentation
from trimtab.tasks.images.sets import ImageData, Split, load_images
from trimtab.tasks.images.sets.image_data import fixed_order
from trimtab.tasks.images.start import load_start_, refuse_changes_of_start
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.task import Examples, Task

Images = tuple[Tensor, Tensor]
"""A batch: images (B, C, side, side), uint8, and labels (B,), int64."""


@dataclass(frozen=True, kw_only=True)
class ImagesRecipe(Recipe):
    """A ViT that tells images apart, by cross-entropy. Metrics: "accuracy", which decides, and "eval_loss", in nats.

    Without `validation`, what is evaluated while training is the test set, as the comparisons on these sets report it.
    No recipe here lets it decide anything; a run with `patience`, or whoever chooses a learning rate by it, does, and
    it is then no fair test. With `validation`, so many training images, the same whatever the seed, are held out and
    evaluated on, and the test set is measured once, at the end.

    Attributes:
        data: name of the data set, or path of a folder, see `trimtab.tasks.images.load_images`.
        model: the ViT.
        augment: what is done to the images and labels of a training batch.
        validation: training images that are held out; 0 evaluates on the test set.
        skip_unreadable: whether files of a folder that cannot be read are left out, with a warning, and no error.
        weights: run or checkpoint that the weights start from, also of a SimCLR run; None draws them.
        new_head: whether the head is drawn all the same, for other classes.

    Raises:
        RecipeError: a field is out of range, or has the wrong type.
    """

    data: str
    model: ViTConfig
    augment: Augment = Augment()  # noqa: RUF009 - it is frozen
    validation: int = 0
    skip_unreadable: bool = False
    weights: str | None = None
    new_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation < 0:
            raise RecipeError(f"validation must be at least 0, got {self.validation}")
        if self.model.num_classes < 2:
            raise RecipeError(
                f"model.num_classes must be at least 2 to tell images apart, got {self.model.num_classes}"
            )
        if self.new_head and self.weights is None:
            raise RecipeError("new_head is for a start from weights: without, every weight is drawn, so leave it out")
        if self.weights is not None:
            refuse_changes_of_start(self.stabilizer)

    def task(self) -> Task:
        """Load the data and draw the model.

        Raises:
            DataError: the data set cannot be loaded, or has one class only.
            CheckpointError: `weights` is no checkpoint, or not of such a model.
            RecipeError: the model does not fit the data, or kornia is needed and not installed.
        """
        data = load_images(self.data, self.model.image_size, self.skip_unreadable)
        self._check_fit(data)
        augmented = augmentation(self.augment, data.standardize, data.side, data.num_classes)
        train, held_out = _parted(data.train.size, self.validation)
        test = _examples(data.test, torch.arange(data.test.size))
        model = ViT(self.model)
        if self.weights is not None:
            load_start_(model, self.weights, self.new_head)

        def loss(model: nn.Module, batch: Images) -> Tensor:
            images, target = augmented(*batch)
            return F.cross_entropy(model(images), target, label_smoothing=self.augment.label_smoothing)

        def score(model: nn.Module, batch: Images) -> dict[str, Tensor]:
            images, labels = batch
            return scores(model(data.standardize(images)), labels)

        return Task(
            model=model,
            train=_examples(data.train, train, training=True),
            loss=loss,
            evaluation=_examples(data.train, held_out) if self.validation else test,
            test=test if self.validation else None,
            score=score,
            metric="accuracy",
            higher_is_better=True,
            facts={"unreadable_files": len(data.unreadable)} if data.unreadable else {},
        )

    def _check_fit(self, data: ImageData) -> None:
        """Refuse a model whose images or classes are not the data's, and a validation set that leaves nothing."""
        if data.num_classes < 2:
            raise DataError(f"{self.data} has one class only ({data.classes[0]}): telling images apart takes two")
        fits = (("image_size", data.side), ("in_channels", data.channels), ("num_classes", data.num_classes))
        wrong = {name: expected for name, expected in fits if getattr(self.model, name) != expected}
        if wrong:
            named = f" ({_few(data.classes)})" if "num_classes" in wrong else ""
            needs = ", ".join(f"{name} {expected}" for name, expected in wrong.items())
            has = ", ".join(str(getattr(self.model, name)) for name in wrong)
            flags = " ".join(f"--model.{name.replace('_', '-')} {expected}" for name, expected in wrong.items())
            raise RecipeError(f"{self.data} needs model {needs}{named}, the recipe has {has}: {flags}")
        if self.validation >= data.train.size:
            raise RecipeError(
                f"validation must be below the {data.train.size:,} training images of {self.data}, got "
                f"{self.validation:,}"
            )


def scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Whether each image is classified rightly, and its cross-entropy; logits that are not finite count as wrong.

    Args:
        logits: (B, num_classes).
        labels: (B,), int64.
    """
    right = (logits.argmax(dim=-1) == labels) & logits.isfinite().all(dim=-1)  # (B,)
    return {"accuracy": right.float(), "eval_loss": F.cross_entropy(logits, labels, reduction="none")}


def _parted(size: int, validation: int) -> tuple[Tensor, Tensor]:
    """The indices of the training images, and of those held out, each in their order."""
    order = fixed_order(size)
    return order[validation:].sort().values, order[:validation].sort().values


def _examples(split: Split, chosen: Tensor, training: bool = False) -> Examples:
    def batch(indices: Tensor, generator: torch.Generator) -> Images:
        indices = chosen[indices]
        return split.read(indices, generator if training else None), split.labels[indices]

    return Examples(len(chosen), batch)


def _few(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
