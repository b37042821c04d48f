import pytest
import torch

from trimtab.errors import DataError
from trimtab.tasks.contrast.views import view_maker


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32), (3, 64)])
def test_views_are_random_images_of_the_same_kind(channels: int, side: int) -> None:
    images = torch.randint(256, (6, channels, side, side), dtype=torch.uint8)
    images[3:] = images[:3]
    view = view_maker(channels, side)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        first = view(images)
    assert (first.shape, first.dtype, first.requires_grad) == (images.shape, torch.float32, False)
    assert 0 <= first.min() < 0.4 < 0.6 < first.max() <= 1
    assert all(not torch.allclose(first[i], first[i + 3], atol=0.05) for i in range(3))  # each image its own
    again, state = view(images), torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(view(images), first)  # torch's global generator decides, and nothing else
    assert torch.equal(view(images), again)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_view_shows_what_is_in_the_image() -> None:
    images = torch.zeros(200, 1, 28, 28, dtype=torch.uint8)
    images[:100] = 200  # a white one stays lighter than a black one, whatever is cropped, erased or dimmed
    views = view_maker(1, 28)(images)
    assert views[:100].mean(dim=(1, 2, 3)).min() > views[100:].mean(dim=(1, 2, 3)).max()


def test_other_channels_are_refused() -> None:
    with pytest.raises(DataError, match="of grey images or of three colours, got 4 channels"):
        view_maker(4, 32)
