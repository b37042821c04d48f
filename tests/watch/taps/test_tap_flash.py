"""flash-attn, which cannot be installed here: a module of the same names and meanings, by plain torch."""

import copy
import importlib
import inspect
import math
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from trimtab.watch.observe import observe
from trimtab.watch.taps import AttentionTap


def logits_of(q, k, scale, causal, window, softcap, slopes) -> Tensor:
    """(B, H, L, S) with -inf where a key is hidden; q (B, L, H, D), k (B, S, Hk, D)."""
    q, k = q.double().transpose(1, 2), k.double().transpose(1, 2)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    L, S = logits.shape[-2:]
    gap = torch.arange(S) - (torch.arange(L)[:, None] + S - L)  # key minus the query's own place
    if slopes is not None:
        logits = logits - (slopes if slopes.ndim == 2 else slopes[None])[..., None, None] * gap.abs()
    left, right = window[0], 0 if causal else window[1]
    hidden = torch.zeros(L, S, dtype=torch.bool)
    if left >= 0:
        hidden |= gap < -left
    if right >= 0:
        hidden |= gap > right
    return logits.masked_fill(hidden, -math.inf)


def attend(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes) -> Tensor:
    logits = logits_of(q, k, softmax_scale, causal, window_size, softcap, alibi_slopes)
    weights = logits.softmax(-1).nan_to_num(0).to(v.dtype)
    v = v.transpose(1, 2).repeat_interleave(q.shape[2] // v.shape[2], 1)
    return (weights @ v).transpose(1, 2)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    return attend(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes)


def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None
):
    return attend(*qkv.unbind(2), softmax_scale, causal, window_size, softcap, alibi_slopes)


def flash_attn_kvpacked_func(
    q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None
):
    return attend(q, *kv.unbind(2), softmax_scale, causal, window_size, softcap, alibi_slopes)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    parts = zip(q.split(cu_seqlens_q.diff().tolist()), k.split(cu_seqlens_k.diff().tolist()),
                v.split(cu_seqlens_k.diff().tolist()), strict=True)  # fmt: skip
    return torch.cat(
        [
            attend(*(x[None] for x in part), softmax_scale, causal, window_size, softcap, alibi_slopes)[0]
            for part in parts
        ]
    )


def flash_attn_varlen_qkvpacked_func(
    qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0
):
    q, k, v = qkv.unbind(1)
    rest = (dropout_p, softmax_scale, causal, window_size, softcap)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *rest)


def version_3(q, k, v, softmax_scale=None, causal=False, qv=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0):
    """Version 3 has no dropout, so its other arguments stand in other places."""
    return attend(q, k, v, softmax_scale, causal, window_size, softcap, None)


@pytest.fixture(autouse=True)
def flash_attn(monkeypatch) -> ModuleType:
    module = ModuleType("flash_attn")
    for name, function in list(globals().items()):
        if name.startswith("flash_attn_") and inspect.isfunction(function):
            setattr(module, name, function)
    newer = ModuleType("flash_attn_interface")
    newer.flash_attn_func = version_3
    version_3.__name__ = "flash_attn_func"
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", newer)
    return module


class Model(nn.Module):
    """Calls a function, found by `how`, on what it is given."""

    def __init__(self, how) -> None:
        super().__init__()
        self.how = how

    def forward(self, *args, **kwargs):
        return self.how()(*args, **kwargs)


def dense(**options) -> Tensor:
    """Mean entropy per head by definition, queries that see nothing left out."""
    names = ("scale", "causal", "window", "softcap", "slopes")
    defaults = (None, False, (-1, -1), 0.0, None)
    rest = [options.get(name, default) for name, default in zip(names, defaults, strict=True)]
    logits = logits_of(options["q"], options["k"], *rest)
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1).movedim(1, 0).flatten(1)
    return entropy.nanmean(1)


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ({}, {}),
        ({"causal": True}, {"causal": True}),
        ({"window_size": (2, 1)}, {"window": (2, 1)}),
        ({"causal": True, "window_size": (2, -1)}, {"causal": True, "window": (2, -1)}),
        ({"softcap": 1.5, "softmax_scale": 0.7}, {"softcap": 1.5, "scale": 0.7}),
        ({"alibi_slopes": SLOPES, "causal": True}, {"slopes": SLOPES, "causal": True}),
    ],
)
@pytest.mark.parametrize("lengths", [(5, 9), (9, 5)])
def test_the_dense_function_with_fewer_key_heads(given, means, lengths, flash_attn) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, lengths[0], 4, 8) * 2, torch.randn(2, lengths[1], 2, 8), torch.randn(2, lengths[1], 2, 8)
    model = Model(lambda: flash_attn.flash_attn_func)
    with observe(model) as seen:
        output = model(q, k, v, **given)
    assert output.shape == q.shape
    assert seen.heads["(root)"].entropy == pytest.approx(dense(q=q, k=k, **means).tolist(), abs=1e-5)
    assert [(row.back_end, row.seen) for row in seen.coverage] == [("flash-attn", "exact")]


def test_packed_and_version_3_and_by_place(flash_attn) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 6, 4, 8).unbind()
    newer = sys.modules["flash_attn_interface"]
    expected = dense(q=q, k=k, causal=True, scale=0.5)
    for function, args in (
        (lambda: flash_attn.flash_attn_qkvpacked_func, (torch.stack([q, k, v], 2), 0.1, 0.5, True)),
        (lambda: flash_attn.flash_attn_kvpacked_func, (q, torch.stack([k, v], 2), 0.1, 0.5, True)),
        (lambda: newer.flash_attn_func, (q, k, v, 0.5, True)),
    ):
        model = Model(function)
        with observe(model) as seen:
            model(*args)
        assert seen.heads["(root)"].entropy == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (2, 3)])
def test_sequences_of_several_lengths(causal, window, flash_attn) -> None:
    torch.manual_seed(0)
    q_ends, k_ends = torch.tensor([0, 3, 3, 9]), torch.tensor([0, 7, 9, 14])
    q, k, v = torch.randn(9, 4, 8) * 2, torch.randn(14, 2, 8), torch.randn(14, 2, 8)
    model = Model(lambda: flash_attn.flash_attn_varlen_func)
    with observe(model) as seen:
        model(q, k, v, q_ends, k_ends, 6, 7, causal=causal, window_size=window)
    rows, shares = [], []
    for b in (0, 2):
        part_q, part_k = q[None, q_ends[b] : q_ends[b + 1]], k[None, k_ends[b] : k_ends[b + 1]]
        logits = logits_of(part_q, part_k, None, causal, window, 0.0, None)
        rows.append(torch.special.entr(logits.softmax(-1)).sum(-1)[0])
        shares.append(rows[-1] / logits.isfinite().sum(-1)[0].log())  # 0 / 0 where there is no choice
    heads = seen.heads["(root)"]
    assert heads.entropy == pytest.approx(torch.cat(rows, 1).nanmean(1).tolist(), abs=1e-5)
    assert heads.normalized == pytest.approx(torch.cat(shares, 1).nanmean(1).tolist(), abs=1e-5)


def test_packed_sequences(flash_attn) -> None:
    torch.manual_seed(0)
    qkv, ends = torch.randn(9, 3, 4, 8), torch.tensor([0, 4, 9])
    model = Model(lambda: flash_attn.flash_attn_varlen_qkvpacked_func)
    with observe(model) as seen:
        model(qkv, ends, 5)
    q, k, _ = qkv.unbind(1)
    both = [dense(q=q[None, a:b], k=k[None, a:b]) * (b - a) for a, b in ((0, 4), (4, 9))]
    assert seen.heads["(root)"].entropy == pytest.approx((sum(both) / 9).tolist(), abs=1e-5)


def test_a_reference_imported_by_another_module_is_followed_and_put_back(flash_attn, monkeypatch) -> None:
    user = ModuleType("user_of_flash")
    user.flash_attn_func = flash_attn.flash_attn_func
    monkeypatch.setitem(sys.modules, "user_of_flash", user)
    model, before = Model(lambda: user.flash_attn_func), user.flash_attn_func
    x = torch.randn(2, 6, 4, 8)
    tap = AttentionTap(model, lambda: True)
    model(x, x, x)
    assert list(tap.take()) == ["(root)"]
    assert user.flash_attn_func is before
    tap.close()


def test_what_is_not_followed_is_listed(flash_attn) -> None:
    x, ends = torch.randn(6, 4, 8), torch.tensor([0, 6])
    model = Model(lambda: flash_attn.flash_attn_varlen_func)
    with observe(model) as seen:
        model(x, x, x, ends, ends, 6, 6, block_table=torch.zeros(1, 1, dtype=torch.int32))
    assert seen.heads == {}
    assert "block_table" in seen.coverage.unseen["(root)"]


def of_transformers(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, nn.Module]:
    """A Llama that attends by a kernel as the hub has them, in no module of a known name; and the same, eager."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    library = importlib.import_module("transformers.modeling_flash_attention_utils")
    for name in [name for name in vars(library) if name.startswith(("_flash_", "_process_", "_loaded_"))]:
        monkeypatch.setattr(library, name, getattr(library, name))  # put back what the next lines set
    kernel = (flash_attn_func, flash_attn_varlen_func, None, library._pad_input, library._unpad_input)
    monkeypatch.setattr(library, "_lazy_imports", lambda *args, **kwargs: kernel)
    library.lazy_import_flash_attention("kernels-community/flash-attn2")
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    eager = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    model = copy.deepcopy(eager)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "flash_attention_2"
    monkeypatch.setattr(library, "_loaded_implementation", "flash_attention_2")
    return model, eager


def test_a_kernel_from_the_hub_is_seen_through_transformers(monkeypatch) -> None:
    model, eager = of_transformers(monkeypatch)
    tokens = torch.randint(23, (2, 7))
    with observe(model) as seen:
        model(input_ids=tokens)
    with observe(eager) as expected:
        eager(input_ids=tokens)
    assert {row.back_end for row in seen.coverage} == {"flash-attn"}
    assert len(seen.heads) == 2
    for name, heads in seen.heads.items():
        for one, other in zip(heads, expected.heads[name], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_kernel_from_the_hub_sees_no_padding(monkeypatch) -> None:
    model, eager = of_transformers(monkeypatch)
    tokens, lengths = torch.randint(23, (2, 7)), (7, 4)
    with observe(model) as seen:
        model(input_ids=tokens, attention_mask=(torch.arange(7) < torch.tensor(lengths)[:, None]).long())
    total = dict.fromkeys(seen.heads, 0)
    for row, length in zip(tokens, lengths, strict=True):
        with observe(eager) as alone:
            eager(input_ids=row[None, :length])
        for name, heads in alone.heads.items():
            total[name] = total[name] + heads.entropy * length
    assert len(total) == 2
    for name, entropy in total.items():
        torch.testing.assert_close(seen.heads[name].entropy, entropy / sum(lengths), rtol=0, atol=1e-5)


def test_attention_sinks_are_listed(monkeypatch, flash_attn) -> None:
    """Kernels from the hub take them; they change the softmax."""

    def flash_attn_func(q, k, v, causal=False, s_aux=None):
        return v

    monkeypatch.setattr(flash_attn, "flash_attn_func", flash_attn_func)
    x = torch.randn(1, 6, 4, 8)
    model = Model(lambda: flash_attn.flash_attn_func)
    with observe(model) as seen:
        model(x, x, x, s_aux=torch.zeros(4))
    assert "s_aux" in seen.coverage.unseen["(root)"]


@pytest.mark.parametrize("window", [(None, None), (-2, -7), None])
def test_every_way_to_say_no_window(window, flash_attn, monkeypatch) -> None:
    def flash_attn_func(q, k, v, window_size=window):
        return v

    monkeypatch.setattr(flash_attn, "flash_attn_func", flash_attn_func)
    q, k = torch.randn(2, 1, 6, 4, 8)
    with observe(model := Model(lambda: flash_attn.flash_attn_func)) as seen:
        model(q, k, k)
    assert seen.heads["(root)"].entropy == pytest.approx(dense(q=q, k=k).tolist(), abs=1e-5)
