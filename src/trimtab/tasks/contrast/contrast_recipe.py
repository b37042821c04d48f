"""`ContrastRecipe`: everything that decides the numbers of a contrastive run."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.errors import RecipeError
from trimtab.models.simclr import ProjectorNorm, SimCLR
from trimtab.models.vit import ViTConfig
from trimtab.tasks.contrast.evaluation import evaluator
from trimtab.tasks.contrast.nt_xent import nt_xent, place
from trimtab.tasks.contrast.views import view_maker
from trimtab.tasks.images.sets import ImageData, Split, load_images
from trimtab.tasks.images.sets.image_data import fixed_order
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.task import Examples, Task


@dataclass(frozen=True, kw_only=True)
class ContrastRecipe(Recipe):
    """SimCLR with a ViT, told what it is worth by classifiers of its frozen features.

    Metrics: "probe_accuracy" of a linear probe, which decides; "eval_loss", the probe's cross-entropy, in nats; and
    "knn_accuracy" of nearest neighbours. Probe and neighbours know the labels of `probe_images` training images. The
    loss in the log is NT-Xent.

    What is evaluated while training is the test set, unless `validation` images are held out.

    Attributes:
        data: name of the data set, see `trimtab.tasks.images.load_images`.
        model: the encoder, a ViT without classes.
        projector_hidden: features between the two layers of the projector.
        projector_out: features of an embedding.
        projector_norm: BatchNorm between the projector's layers ("batch"), or nothing ("none").
        freeze_patches: whether the patch embedding stays the random projection it starts as (MoCo v3).
        temperature: of NT-Xent.
        probe_images: how many training images, always the same, the probe and the neighbours know.
        validation: how many training images, always the same, are held out and evaluated on; the test set is then
            measured once, at the end.
        skip_unreadable: whether files of a folder that cannot be read are left out, with a warning.

    Raises:
        RecipeError: a field is out of range, or has the wrong type; or the step has several micro-batches.
    """

    data: str
    model: ViTConfig
    projector_hidden: int = 256
    projector_out: int = 64
    projector_norm: ProjectorNorm = "none"
    freeze_patches: bool = False
    temperature: float = 0.2
    probe_images: int = 5000
    validation: int = 0
    skip_unreadable: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < float("inf"):
            raise RecipeError(f"temperature must be a positive number, got {self.temperature}")
        if self.batch_size < 2:
            raise RecipeError(
                "batch_size must be at least 2, got 1: the negatives of an image are the others of its step"
            )
        if self.probe_images < 1 or self.validation < 0:
            raise RecipeError(
                f"probe_images must be at least 1 and validation at least 0, got {self.probe_images} and "
                f"{self.validation}"
            )
        if self.accumulate > 1:
            raise RecipeError(
                f"accumulate must be 1, got {self.accumulate}: the negatives of an image are those of its micro-batch, "
                "so that micro-batches change the loss. Take more processes, whose images are negatives of each other"
            )

    def task(self) -> Task:
        """Load the data and draw the model.

        Raises:
            DataError: the data set cannot be loaded.
            RecipeError: the model does not fit the data, or the data are too few; or several processes without GPUs
                cannot have the projector's BatchNorm.
        """
        if self.projector_norm == "batch" and place()[1] > 1 and not torch.cuda.is_available():
            raise RecipeError(
                'projector_norm "batch" is over all processes, which torch has on GPUs only: use "none", or one process'
            )
        data = load_images(self.data, image_size=self.model.image_size, skip_unreadable=self.skip_unreadable)
        for name, expected in (("image_size", data.side), ("in_channels", data.channels)):
            if getattr(self.model, name) != expected:
                got = getattr(self.model, name)
                raise RecipeError(
                    f"{self.data} needs model {name} {expected}, the recipe has {got}: "
                    f"--model.{name.replace('_', '-')} {expected}"
                )
        known = min(self.probe_images, data.train.size - self.validation)
        if known < 1:
            raise RecipeError(
                f"validation must leave some of the {data.train.size:,} training images, got {self.validation:,}"
            )
        order = fixed_order(data.train.size)  # the images held out are those of an `ImagesRecipe`
        held_out, rest = order[: self.validation], order[self.validation :].sort().values
        bank = order[self.validation : self.validation + known]
        everything = torch.arange(data.test.size)
        prepare, score = evaluator(data, bank, 4 * self.batch_size)
        return Task(
            model=SimCLR(
                self.model, self.projector_hidden, self.projector_out, self.projector_norm, self.freeze_patches
            ),
            train=_unlabelled(data.train, rest),
            loss=_contrast(data, self.temperature),
            evaluation=_labelled(data.train, held_out) if self.validation else _labelled(data.test, everything),
            test=_labelled(data.test, everything) if self.validation else None,
            score=score,
            metric="probe_accuracy",
            higher_is_better=True,
            prepare=prepare,
            facts=_facts(data, known, self.probe_images),
        )


def _facts(data: ImageData, known: int, asked: int) -> dict[str, int]:
    """What a reader of the numbers should know: what was left out, and a probe of fewer images than asked for."""
    facts = {"unreadable_files": len(data.unreadable)} if data.unreadable else {}
    return facts | ({"images_of_the_probe": known} if known < asked else {})


def _unlabelled(split: Split, chosen: Tensor) -> Examples:
    # Without a generator: what is random is the views, which are made of the image as it is evaluated.
    return Examples(len(chosen), lambda indices, _: split.read(chosen[indices], None))


def _labelled(split: Split, chosen: Tensor) -> Examples:
    return Examples(len(chosen), lambda indices, _: (split.read(chosen[indices], None), split.labels[chosen[indices]]))


def _contrast(data: ImageData, temperature: float) -> Callable[[nn.Module, Tensor], Tensor]:
    """From a model and uint8 images (B, C, side, side) to NT-Xent of two views of each."""
    view = view_maker(data.channels, data.side)

    def loss(model: nn.Module, images: Tensor) -> Tensor:
        views = data.standardize(255 * view(torch.cat([images, images])))  # (2B, C, side, side)
        _, embeddings = model(views)  # one forward, so that a BatchNorm sees both views
        first, second = embeddings.chunk(2)
        return nt_xent(first, second, temperature)

    return loss
