from typing import Any

import pytest
import torch

from trimtab.errors import RecipeError
from trimtab.models import ViTConfig
from trimtab.models.simclr import FixedPatches, SimCLR
from trimtab.stabilizers import stabilize_

CONFIG = ViTConfig(8, 4, 1, 0, dim=16, depth=1, num_heads=2, init="xavier")


def drawn(**options: Any) -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(CONFIG, hidden=12, out=6, **options)


def test_features_come_from_the_encoder_and_embeddings_from_the_projector() -> None:
    model, images = drawn(), torch.randn(3, 1, 8, 8)
    features, embeddings = model(images)
    assert torch.equal(features, model.encoder.features(images))
    first, _, _, last = model.projector
    by_hand = (features @ first.weight.T + first.bias).relu() @ last.weight.T + last.bias
    torch.testing.assert_close(embeddings, by_hand)
    assert (features.shape, embeddings.shape) == ((3, 16), (3, 6))


def test_batch_norm_of_the_projector_normalises_what_is_hidden() -> None:
    model = drawn(norm="batch")
    seen = []
    model.projector[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(torch.randn(64, 1, 8, 8))
    torch.testing.assert_close(seen[0].mean(dim=0), torch.zeros(12), atol=1e-5, rtol=0)
    assert model.projector[1].running_mean.any()


def test_fixed_patches_compute_the_same_under_the_same_names() -> None:
    plain, fixed, images = drawn(), drawn(freeze_patches=True), torch.randn(2, 1, 8, 8)
    assert plain.state_dict().keys() == fixed.state_dict().keys()
    fixed.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fixed(images), plain(images))
    names = {name for name, _ in plain.named_parameters()} - {name for name, _ in fixed.named_parameters()}
    assert names == {"encoder.patches.weight", "encoder.patches.bias"}


@pytest.mark.parametrize("spec", ["sigma:gamma_init=one:init_std=0.4", "weight-norm", "init-scale", "spectral-norm"])
def test_no_stabilizer_changes_fixed_patches(spec: str) -> None:
    model = drawn(freeze_patches=True)
    before = {name: tensor.clone() for name, tensor in model.encoder.patches.state_dict().items()}
    stabilize_(model, spec)
    assert type(model.encoder.patches) is FixedPatches
    after = model.encoder.patches.state_dict()
    assert after.keys() == before.keys()  # no gamma, no vectors
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_fixed_patches_neither_train_nor_decay() -> None:
    model = stabilize_(drawn(freeze_patches=True), "sigma")
    before = model.encoder.patches.weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5)
    moved = model.encoder.position.detach().clone()
    model(torch.randn(4, 1, 8, 8))[1].square().sum().backward()
    optimizer.step()
    assert torch.equal(model.encoder.patches.weight, before)
    assert not torch.equal(model.encoder.position, moved)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(RecipeError, match="num_classes must be 0, got 10"):
        SimCLR(ViTConfig(8, 4, 1, 10, 16, 1, 2), 12, 6)
    with pytest.raises(RecipeError, match="at least one feature, got 0 hidden"):
        SimCLR(CONFIG, 0, 6)
    with pytest.raises(RecipeError, match="one of none, batch; got 'layer'"):
        drawn(norm="layer")
