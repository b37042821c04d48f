"""scaled_dot_product_attention, by whatever name a program knows it."""

import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import scaled_dot_product_attention as attend

from trimtab.attention import attention_stats_reference
from trimtab.watch.observe import observe
from trimtab.watch.taps import AttentionTap


class Calls(nn.Module):
    """One head over (B, L, 8), by a function of query, key and value."""

    def __init__(self, function) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(8, 8), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x)[:, None], x[:, None], x[:, None])[:, 0]


SPELLINGS = {
    "F.": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "imported": lambda q, k, v: scaled_dot_product_attention(q, k, v),
    "renamed": lambda q, k, v: attend(q, k, v),
    "torch.nn.functional.": lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v),
    "torch._C._nn.": lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v),
    "by keywords": lambda q, k, v: F.scaled_dot_product_attention(key=k, value=v, query=q),
    "an attribute of the module": F.scaled_dot_product_attention,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_seen_and_left_as_it_was(spelling) -> None:
    torch.manual_seed(0)
    model, x = Calls(SPELLINGS[spelling]), torch.randn(2, 5, 8)
    with observe(model) as seen:
        output = model(x)
    assert torch.equal(output, model(x))
    reference = attention_stats_reference(model.linear(x)[:, None], x[:, None])
    assert seen.heads["(root)"].entropy == pytest.approx([reference.entropy.mean().item()], abs=1e-5)
    for name in ("F", "attend", "scaled_dot_product_attention"):
        function = globals()[name]
        function = function.scaled_dot_product_attention if name == "F" else function
        assert function is torch._C._nn.scaled_dot_product_attention
        assert type(function).__name__ == "builtin_function_or_method"


@pytest.mark.parametrize("mask", ["none", "of all", "of each"])
def test_without_a_dimension_of_heads_it_is_one_head(mask: str) -> None:
    """torch's own documentation of the function has (B, L, D)."""
    torch.manual_seed(0)
    query, key = torch.randn(3, 5, 8), torch.randn(3, 6, 8)
    mask = {"none": None, "of all": torch.rand(5, 6) < 0.8, "of each": torch.rand(3, 5, 6) < 0.8}[mask]
    with observe(model := Calls3d()) as seen:
        model(query, key, mask)
    expected = attention_stats_reference(query, key, attn_mask=mask).entropy.mean().item()
    assert seen.heads["(root)"].entropy == pytest.approx([expected], abs=1e-5)


class Calls3d(nn.Module):
    def forward(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, key, attn_mask=mask)


def test_attention_of_other_models_and_other_threads_is_not_taken() -> None:
    torch.manual_seed(0)
    other = Calls(SPELLINGS["F."])
    x = torch.randn(2, 5, 8)

    class WithAThread(Calls):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: other(x * 100))
            thread.start()
            thread.join()
            return super().forward(x)

    model = WithAThread(SPELLINGS["F."])
    with observe(model) as seen:
        other(x * 100)
        model(x)
        other(x * 100)
    assert list(seen.heads) == ["(root)"]
    reference = attention_stats_reference(model.linear(x)[:, None], x[:, None])
    assert seen.heads["(root)"].max_logit == pytest.approx([reference.max_logit.max().item()], rel=1e-5)


def test_two_models_watched_at_once_one_inside_the_other() -> None:
    inner = Calls(SPELLINGS["F."])

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x) + self.inner(x)

    outer = Outer()  # the second tap looks for names of the function while the first has it replaced
    first, second = AttentionTap(outer, lambda: True), AttentionTap(inner, lambda: True)
    original = torch._C._nn.scaled_dot_product_attention
    outer(torch.randn(2, 5, 8))
    assert F.scaled_dot_product_attention is original
    assert list(first.take()) == ["(root)", "inner"]
    assert list(second.take()) == ["(root)"]
    inner(torch.randn(2, 5, 8))
    assert first.take() == {}
    assert list(second.take()) == ["(root)"]
    first.close()
    second.close()


def test_stopped_by_the_keyboard_inside_two_models() -> None:
    """Whatever order the taps are closed in, torch's own functions are back."""

    def stop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise KeyboardInterrupt

    inner = Calls(stop)
    outer = nn.Sequential(inner)
    original, call = torch._C._nn.scaled_dot_product_attention, nn.Module.__call__
    taps = AttentionTap(outer, lambda: True), AttentionTap(inner, lambda: True)
    with pytest.raises(KeyboardInterrupt):
        outer(torch.randn(2, 5, 8))
    inner.function = SPELLINGS["F."]
    outer(torch.randn(2, 5, 8))
    assert list(taps[0].take()) == ["0"]
    inner.function = stop
    with pytest.raises(KeyboardInterrupt):
        outer(torch.randn(2, 5, 8))
    for tap in taps:
        tap.close()
    assert F.scaled_dot_product_attention is original
    assert nn.Module.__call__ is call


@pytest.mark.parametrize("loaded", ["before", "in the forward"])
def test_first_compiled_inside_a_watched_forward(loaded, monkeypatch) -> None:
    """torch.compile reads names of torch functions when it first runs, and must not find replacements under them."""
    torch._dynamo.reset()
    rules = torch._dynamo.trace_rules
    rules.get_torch_obj_rule_map.cache_clear()

    def double(x: Tensor) -> Tensor:
        return 2 * x

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sys.modules["torch._dynamo.trace_rules"] = rules
            return F.scaled_dot_product_attention(x, x, x) + torch.compile(double, backend="eager")(x)

    model = Model()
    tap = AttentionTap(model, lambda: True)
    if loaded != "before":
        monkeypatch.delitem(sys.modules, "torch._dynamo.trace_rules")
    model(torch.randn(2, 5, 8))
    tap.close()
    assert list(tap.take()) == ["(root)"]
    assert torch._C._nn.scaled_dot_product_attention in rules.get_torch_obj_rule_map()


def test_a_module_imported_in_a_watched_forward_has_torchs_own_function(tmp_path, monkeypatch) -> None:
    (tmp_path / "imported_late.py").write_text("from torch.nn.functional import scaled_dot_product_attention as attend")
    monkeypatch.syspath_prepend(tmp_path)

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            import imported_late

            return imported_late.attend(x, x, x)

    model = Model()
    with observe(model) as seen:
        model(torch.randn(2, 5, 8))
    assert list(seen.heads) == ["(root)"]
    assert sys.modules.pop("imported_late").attend is torch._C._nn.scaled_dot_product_attention


def test_data_parallel_wrappers_do_not_show_in_names() -> None:
    model = nn.DataParallel(nn.Sequential(Calls(SPELLINGS["F."])))
    with observe(model) as seen:
        model(torch.randn(2, 5, 8))
    assert list(seen.heads) == ["0"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_are_listed() -> None:
    class Ragged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    x = torch.nested.nested_tensor([torch.randn(3, 2, 8), torch.randn(5, 2, 8)], layout=torch.jagged).transpose(1, 2)
    model = Ragged()
    with observe(model) as seen:
        model(x)
    assert seen.heads == {}
    assert "nested" in seen.coverage.unseen["(root)"]


def test_a_function_imported_after_the_first_look_is_seen_beside_others(monkeypatch) -> None:
    """A back-end that a block imports when it first needs it."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = Calls(SPELLINGS["F."]), None

        def forward(self, x: Tensor) -> Tensor:
            y = self.early(x)
            return y if self.late is None else self.late(y)

    model, x = Late(), torch.randn(2, 5, 8)
    tap = AttentionTap(model, lambda: True)
    model(x)
    assert list(tap.take()) == ["early"]
    module = types.ModuleType("a_late_back_end")
    module.attend = F.scaled_dot_product_attention
    monkeypatch.setitem(sys.modules, "a_late_back_end", module)
    model.late = Calls(lambda q, k, v: module.attend(q, k, v))
    model(x)
    tap.take()  # notices that there are new modules
    model(x)
    assert list(tap.take()) == ["early", "late"]
    tap.close()
