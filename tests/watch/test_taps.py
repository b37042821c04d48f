import contextlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.attention import attention_stats_reference
from trimtab.reparam import reparametrize_
from trimtab.watch import Watch


def heads_of(folder: Path) -> list[str]:
    return [f"{head['module']} {head['head']}" for head in json.loads((folder / "heads.json").read_text())["heads"]]


class Calls(nn.Module):
    """Attention wherever `forward` is told to call it; remembers the entropy and logits of every call."""

    def __init__(self, how: str | type[BaseException] = "plain") -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(4, 4), how
        self.seen: list = []

    def attend(self, x: Tensor) -> Tensor:
        query = self.linear(x)[:, None]  # (B, 1 head, L, 4)
        self.seen.append(attention_stats_reference(query.detach(), query.detach()))
        # The sine saves its argument: a recomputation has to run the attention to its end.
        return F.scaled_dot_product_attention(query, query, query)[:, 0].sin()

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.how, str):
            self.attend(x)
            raise self.how
        if self.how == "checkpoint":
            return checkpoint(self.attend, x, use_reentrant=False)
        if self.how == "reentrant":
            return checkpoint(self.attend, x, use_reentrant=True)
        return self.attend(x)


def told_of_attention(caplog) -> list[str]:
    """Every warning but the one that these tests take no optimiser step."""
    messages = [record.message for record in caplog.records]
    return [message for message in messages if not message.startswith("no optimiser step was seen")]


def entropy(folder: Path) -> list[float]:
    raw = (folder / "heads_entropy.f32").read_bytes()
    return torch.frombuffer(bytearray(raw), dtype=torch.float32).tolist()


@pytest.mark.parametrize("how", ["checkpoint", "reentrant", "around the root"])
def test_recomputed_activations_are_not_counted_twice(tmp_path, how) -> None:
    """With two micro-batches, one of them recomputed, a second count would move the average."""
    torch.manual_seed(0)
    model = Calls("plain" if how == "around the root" else how)
    with Watch(model, tmp_path, every=1) as watch:
        for size in (1.0, 30.0):
            x = torch.randn(2, 6, 4) * size
            x.requires_grad_()
            around = how == "around the root" and size == 1.0
            (checkpoint(model, x, use_reentrant=False) if around else model(x)).sum().backward()
        watch.step(1.0)
    assert len(model.seen) >= 3  # it was recomputed
    first, second = model.seen[0], next(s for s in reversed(model.seen))
    expected = (first.entropy.mean() + second.entropy.mean()) / 2
    assert entropy(tmp_path) == pytest.approx([expected.item()], abs=1e-5)
    assert heads_of(tmp_path) == ["(root) 0"]


def test_forwards_of_one_step_are_averaged_and_maxed(tmp_path) -> None:
    torch.manual_seed(0)
    model = Calls()
    with Watch(model, tmp_path, every=2) as watch:
        for _ in range(2):
            model.seen.clear()
            for batch in (1, 5, 2):
                model(torch.randn(batch, 6, 4) * batch)
            watch.step(1.0)
    means = [seen.entropy.mean().item() for seen in model.seen]  # every call has the same weight
    assert entropy(tmp_path)[1] == pytest.approx(sum(means) / 3, abs=1e-5)
    largest = max(seen.max_logit.max().item() for seen in model.seen)
    assert watch.last["max_logit"] == pytest.approx(largest, rel=1e-5)


def test_eval_is_not_counted(tmp_path) -> None:
    torch.manual_seed(0)
    model = Calls()
    with Watch(model, tmp_path, every=1) as watch:
        model(torch.randn(2, 6, 4))
        model.eval()(torch.randn(2, 6, 4) * 50)
        model.train()
        watch.step(1.0)
    assert entropy(tmp_path) == pytest.approx([model.seen[0].entropy.mean().item()], abs=1e-5)


def test_a_step_that_is_not_logged_is_not_looked_at(tmp_path, monkeypatch) -> None:
    model, looked = Calls(), []
    monkeypatch.setattr("trimtab.watch.taps.sdpa.head_stats", lambda *_, **__: looked.append(1) or 1 / 0)
    monkeypatch.setattr("trimtab.watch.taps.optimizer.gradient_moments", lambda _: looked.append(2) or {})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, tmp_path, every=10) as watch:
        watch.step(1.0)
        for _ in range(8):
            model(torch.randn(2, 6, 4)).sum().backward()
            optimizer.step()
            watch.step(1.0)
        assert looked == []
        model(torch.randn(2, 6, 4)).sum().backward()
        optimizer.step()
        assert looked == [1, 2]


def test_a_forward_that_raises_leaves_nothing_behind(tmp_path, leaves_nothing) -> None:
    from torch.overrides import _get_current_function_mode_stack

    model = Calls(ZeroDivisionError)
    with Watch(model, tmp_path, every=1) as watch:
        with pytest.raises(ZeroDivisionError):
            model(torch.randn(2, 6, 4))
        assert not _get_current_function_mode_stack()
        model.how = "plain"
        model(torch.randn(2, 6, 4))
        watch.step(1.0)
    assert heads_of(tmp_path) == ["(root) 0"]
    leaves_nothing(model)


def test_a_forward_stopped_by_the_keyboard_leaves_nothing_behind(tmp_path, leaves_nothing) -> None:
    model = Calls()
    model.attend = lambda x: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt), Watch(model, tmp_path, every=1):
        model(torch.randn(2, 6, 4))
    leaves_nothing(model)


class Careful(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.broken, self.error = Calls(error), error

    def forward(self, x: Tensor) -> Tensor:
        with contextlib.suppress(self.error):
            self.broken(x)
        return x


class Names(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.block = Calls()
        self.layers = nn.ModuleDict({"first": Calls()})
        self.careful = Careful(error)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x) + self.block(x)
        x = self.careful(x)
        x = x + F.scaled_dot_product_attention(x, x, x)  # the root's own, after a module was left by an error
        x = self.layers["first"](x)
        foreign = Calls()  # no submodule: its attention is the root's
        return foreign(x)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_calls_are_named_after_their_innermost_module(tmp_path, error) -> None:
    model = Names(error)
    with Watch(model, tmp_path, every=1) as watch:
        for _ in range(2):
            model(torch.randn(2, 6, 4))
            watch.step(1.0)
    names = ["block 0", "block#2 0", "careful.broken 0", "(root) 0", "layers.first 0", "(root)#2 0"]
    assert heads_of(tmp_path) == names
    assert len(entropy(tmp_path)) == 2 * len(names)


def test_torch_encoder_layers_are_seen(tmp_path, caplog) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x, padding = torch.randn(3, 7, 16), torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 5:] = True
    with Watch(model, tmp_path, every=1) as watch:
        model(x, src_key_padding_mask=padding).sum().backward()
        watch.step(1.0)
    assert heads_of(tmp_path) == [f"layers.{n}.self_attn {head}" for n in range(2) for head in range(4)]
    assert 0 < watch.last["entropy_min"] <= 1
    first = model.layers[0].self_attn
    query, key, _ = F.linear(x, first.in_proj_weight, first.in_proj_bias).unflatten(-1, (3, 4, 4)).unbind(-3)
    reference = attention_stats_reference(
        query.transpose(1, 2).detach(), key.transpose(1, 2).detach(), attn_mask=~padding[:, None, None]
    )
    assert entropy(tmp_path)[:4] == pytest.approx(reference.entropy.mean((0, 2)).tolist(), abs=1e-5)
    assert not told_of_attention(caplog)


def test_attention_that_returns_its_weights_is_seen_too(tmp_path, caplog) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.without = nn.MultiheadAttention(8, 2)
            self.with_weights = reparametrize_(nn.MultiheadAttention(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.with_weights(self.without(x, x, x, need_weights=False)[0], x, x)[0]

    model = Both()
    with Watch(model, tmp_path, every=1) as watch:
        model(torch.randn(5, 3, 8))
        watch.step(1.0)
    assert heads_of(tmp_path) == ["without 0", "without 1", "with_weights 0", "with_weights 1"]
    assert watch.coverage().unseen == {}
    assert not told_of_attention(caplog)


def test_attention_that_cannot_be_read_stops_nothing(tmp_path, caplog) -> None:
    from torch.nn.attention.bias import causal_lower_right

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=causal_lower_right(x.shape[-2], x.shape[-2]))

    model = Odd()
    with Watch(model, tmp_path, every=1) as watch:
        model(torch.randn(2, 2, 5, 8))
        watch.step(1.0)
    assert list(watch.coverage().unseen) == ["(root)"]
    assert "max_logit" not in watch.last
    assert len(told_of_attention(caplog)) == 1


def test_under_autocast_the_logits_are_those_of_the_model(tmp_path) -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    model, x = Mixed(), torch.randn(2, 2, 5, 8) * 5
    with Watch(model, tmp_path, every=1) as watch, torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        watch.step(1.0)
    rounded = attention_stats_reference(x.bfloat16(), x.bfloat16()).max_logit.max().item()
    assert watch.last["max_logit"] == pytest.approx(rounded, rel=1e-6)
    assert watch.last["max_logit"] != pytest.approx((x @ x.mT).max().item() / 8**0.5, rel=1e-6)


def test_optimizers_of_other_models_are_not_reported(tmp_path) -> None:
    model, other = Calls(), nn.Linear(2, 2)
    mine = torch.optim.AdamW([*model.parameters()], lr=torch.tensor(0.25))
    theirs = torch.optim.SGD(other.parameters(), lr=7.0)
    with Watch(model, tmp_path, every=1) as watch:
        for _ in range(2):  # the last of several steps is the one that is told
            other(torch.randn(1, 2)).sum().backward()
            theirs.step()
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            model.linear.bias.grad[:2] = torch.tensor([3.0, -4.0])
            mine.step()
        watch.step(1.0)
        assert watch.last["lr"] == [0.25]
        assert watch.last["grad_norm"] == pytest.approx(5)
        theirs.step()
        watch.step(1.0)
        assert "lr" not in watch.last
        assert "grad_norm" not in watch.last


def test_two_optimizers_share_one_gradient_norm(tmp_path) -> None:
    model = Calls()
    optimizers = [torch.optim.SGD([p], lr=lr) for p, lr in zip(model.parameters(), (0.1, 0.2), strict=True)]
    with Watch(model, tmp_path, every=1) as watch:
        for parameter, norm in zip(model.parameters(), (3e200, 4e200), strict=True):
            parameter.data = parameter.data.double()
            parameter.grad = torch.zeros_like(parameter)
            parameter.grad.view(-1)[0] = norm / 1e100
        for optimizer in optimizers:
            optimizer.step()
        watch.step(1.0)
    assert watch.last["lr"] == [0.1, 0.2]
    assert watch.last["grad_norm"] == pytest.approx(5e100)


def test_a_gradient_scale_left_to_the_optimizer_is_taken_out(tmp_path) -> None:
    """GradScaler hands fused optimisers scaled gradients and the scale."""
    model = Calls()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.linear.bias.grad[0] = 3.0 * 1024
    optimizer.grad_scale = torch.tensor(1024.0)
    with Watch(model, tmp_path, every=1) as watch:
        optimizer.step()
        watch.step(1.0)
    assert watch.last["grad_norm"] == pytest.approx(3)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
def test_gradients_that_a_closure_computes_are_those_of_this_step(tmp_path, kind) -> None:
    model = nn.Linear(3, 2)
    optimizer = kind(model.parameters(), lr=0.01)
    with Watch(model, tmp_path, every=1) as watch:
        for size in (1.0, 2.0, 3.0):
            x = torch.full((4, 3), size)

            def closure(x=x) -> Tensor:
                optimizer.zero_grad()
                loss = model(x).square().sum()
                loss.backward()
                return loss

            watch.step(optimizer.step(closure))
            expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
            assert watch.last["grad_norm"] == pytest.approx(expected)
