"""Image data sets by name: held in memory, read from a folder of image files, or made up for dry runs.

Every file of a set with a checksum is held against it before it is read, and every file of a folder has been decoded
once before training starts; so a damaged copy is an error and never a slightly different experiment.
"""

from trimtab.errors import DataError
from trimtab.tasks.data.folder import IMAGENET, image_folder
from trimtab.tasks.images.sets.fake import FAKE, load_fake
from trimtab.tasks.images.sets.folder import load_folder
from trimtab.tasks.images.sets.image_data import ImageData, Split
from trimtab.tasks.images.sets.packed import PACKED, load_packed
from trimtab.words import nearest

__all__ = ["ImageData", "Split", "load_images"]


def load_images(name: str, image_size: int | None = None, skip_unreadable: bool = False) -> ImageData:
    """Load a data set by name.

    Args:
        name: one of

            - "digits": 1,437 + 360 grey images of 8×8; ships with the package;
            - "fashion-mnist": 60,000 + 10,000 grey images of 28×28;
            - "cifar10", "cifar100": 50,000 + 10,000 colour images of 32×32, in their owners' binary files;
            - "cifar10-jpeg": JPEG copies of CIFAR-10, whose pixels, and so whose accuracies, differ slightly;
            - "imagenet": the folder of that name in the data folder;
            - the path of a folder with train/ and val/, in each of which every class has a folder of images;
            - "fake-imagenet": random images in the place of ImageNet's; "fake-imagenet:64" has 64 in each split.

        image_size: the side that images of a folder and fake ones are brought to, pixels; 224 by default. Sets held
            in memory keep their own side.
        skip_unreadable: leave out files of a folder that cannot be read, with a warning that counts and names them.

    Returns:
        The set: memory-mapped if it is held in memory and comes from the data folder.

    Raises:
        DataError: the name is unknown; a folder, or a file in it, is missing, damaged or cannot be read; or there is
            no Pillow.
    """
    side = 224 if image_size is None else image_size
    if side < 1:
        raise DataError(f"images need a side of at least 1 pixel, got {side}")
    if name in PACKED:
        return load_packed(name)
    if name.partition(":")[0] == FAKE:
        return load_fake(name, side)
    folder = image_folder(name)
    if folder is not None:
        return load_folder(name, folder, side, skip_unreadable)
    known = [*PACKED, IMAGENET, FAKE]
    raise DataError(
        f"unknown image data set {name!r}.{nearest(name, known)} There are: {', '.join(known)}, and the path of a "
        "folder with train/ and val/"
    )
