"""QK-Clip: after a step, the same batch has no logit above tau, and heads below it are as they were."""

import contextlib
import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from attention_calls import KINDS, calls_of, images, language_model, tokens, vit
from gloo_processes import in_processes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import trimtab as tt
from trimtab.errors import ConversionError, RecipeError
from trimtab.reparam.heads import Projections, projections
from trimtab.stabilizers import parse, stabilize_
from trimtab.stabilizers.clipper import see_compiled_
from trimtab.stabilizers.head_scaling import shrink_logits_, split_over_heads, wanted_shrinking


def _max_logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Of each head in the first attention that runs, recomputed; nothing is recorded, as there are no gradients."""
    with torch.no_grad():
        return calls_of(lambda: model(inputs))[0].max_logits


def _step(model: nn.Module, *batches: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    """A step that leaves the weights as they are: what changes after it is the clip's doing."""
    for batch in batches:
        model(batch)
    (optimizer or torch.optim.SGD(model.parameters(), lr=0.0)).step()


def _between(values: Tensor) -> float:
    """A number that some of the values exceed and some do not."""
    ordered = values.sort().values
    return float(ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1].mean())


def _rows(attention: Projections) -> tuple[Tensor, Tensor]:
    """Copies of the query and key weights of each head, (heads, head_dim, in)."""
    found = []
    for rows in (attention.query, attention.key):
        weight = getattr(rows.layer, rows.weight_name).detach()
        weight = weight.t() if type(rows.layer).__name__ == "Conv1D" else weight
        found.append(rows.view(weight).flatten(0, 1).clone())
    return found[0], found[1]


@pytest.mark.parametrize("kind", [*KINDS, "vit"])
def test_every_head_has_at_most_tau_and_those_below_are_untouched(kind: str) -> None:
    model = vit() if kind == "vit" else language_model(kind)
    inputs = images() if kind == "vit" else tokens()
    before = _max_logits(model, inputs)
    tau = _between(before)
    (attention,) = projections(model)
    queries, keys = _rows(attention)
    others = {name: p.detach().clone() for name, p in model.named_parameters()}
    stabilize_(model, f"qk-clip:tau={tau!r}")
    _step(model, inputs)
    torch.testing.assert_close(_max_logits(model, inputs), before.clamp(max=tau))
    new_queries, new_keys = _rows(attention)
    below = before <= tau
    assert 0 < int(below.sum()) < len(below)
    assert torch.equal(new_queries[below], queries[below])
    free = below.view(len(keys), -1).any(1)  # key heads of which some query head is below
    assert torch.equal(new_keys[free], keys[free])
    assert not torch.equal(new_queries, queries)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, others[name])}
    assert all(any(part in name for part in ("attn", "attention")) for name in changed)


@pytest.mark.parametrize(
    "options", [{}, {"kdim": 10, "vdim": 14}, {"add_bias_kv": True}], ids=["packed", "apart", "kv"]
)
def test_multihead_attention(options: dict[str, int]) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(24, 4, batch_first=True, **options).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    query = torch.randn(2, 5, 24).double()
    key, value = (torch.randn(2, 5, options.get(name, 24)).double() for name in ("kdim", "vdim"))

    def run() -> None:
        attention(query, key, value, need_weights=False)

    with torch.no_grad():
        before = calls_of(run)[0].max_logits
    stabilize_(attention, f"qk-clip:tau={_between(before)!r}")
    run()
    torch.optim.SGD(attention.parameters(), lr=0.0).step()
    with torch.no_grad():
        torch.testing.assert_close(calls_of(run)[0].max_logits, before.clamp(max=_between(before)))


@pytest.mark.parametrize("sigma", ["sigma", "sigma:blocks=heads"])
def test_under_sigma_reparam_gamma_is_scaled(sigma: str) -> None:
    model = vit()
    before = _max_logits(model, images())
    tau = _between(before)
    stabilize_(model, f"{sigma}+qk-clip:tau={tau!r}")
    weight = model.blocks[0].attention.query.weight.detach().clone()
    _step(model, images())
    after = _max_logits(model, images())
    if sigma == "sigma":  # one gamma for all heads: the worst decides
        torch.testing.assert_close(after, before * tau / before.max())
    else:
        torch.testing.assert_close(after, before.clamp(max=tau))
    assert torch.equal(model.blocks[0].attention.query.weight, weight)


@pytest.mark.parametrize("other", ["qk-norm", "softcap:logits=none"])
def test_what_hides_the_size_of_the_weights_is_refused_before_and_after(other: str) -> None:
    for first, second in (("qk-clip", other), (other, "qk-clip")):
        model = stabilize_(vit(), first)
        before = model(images())
        with pytest.raises(ConversionError, match=r"the model has qk-clip|leave qk-clip away"):
            stabilize_(model, second)
        torch.testing.assert_close(model(images()), before, rtol=0, atol=0)
    stabilize_(stabilize_(vit(), "qk-clip"), "softcap:attention=none")  # the final logits are no matter


def test_what_is_done_later_to_a_part_is_told_by_the_next_forward() -> None:
    for later, why in (("qk-norm", "QK-norm already"), ("weight-norm", "no parameter of its own")):
        model = stabilize_(vit(), "qk-clip")
        stabilize_(model.blocks, later)
        with pytest.raises(ConversionError, match=why):
            model(images())


def test_twice_in_one_model_is_refused() -> None:
    model = vit()
    stabilize_(model.blocks[0].attention, "qk-clip")
    with pytest.raises(ConversionError, match="a part of it, has qk-clip already"):
        stabilize_(model, "qk-clip")


class _OneWeight(nn.Module):
    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)
        self.key = self.query


@pytest.mark.parametrize("spec", ["qk-clip", "qk-norm"])
def test_one_weight_for_queries_and_keys_is_refused(spec: str) -> None:
    """Each would be scaled, or normalised, twice."""
    with pytest.raises(ConversionError, match="queries and keys with one weight"):
        stabilize_(_OneWeight(), spec)


def test_one_sigma_for_queries_and_values_is_refused() -> None:
    model = language_model("gpt2")
    with pytest.raises(ConversionError, match="one sigma for queries or keys and other rows"):
        stabilize_(model, "sigma:blocks=one+qk-clip")


@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.floats(1e-6, 1) | st.just(1.0), min_size=16, max_size=16))
def test_split_over_shared_keys(key_heads: int, group: int, factors: list[float]) -> None:
    g = torch.tensor(factors[: key_heads * group], dtype=torch.float64)
    queries, keys = split_over_heads(g, key_heads)
    torch.testing.assert_close(queries * keys.repeat_interleave(group), g)
    assert bool((queries <= 1).all())
    assert bool((keys <= 1).all())
    assert bool((queries[g == 1] == 1).all())
    assert bool((keys[(g == 1).view(key_heads, group).any(1)] == 1).all())


def test_maxima_that_are_no_reason_to_scale() -> None:
    nothing = torch.tensor([-5.0, 0.0, 100.0, torch.nan, torch.inf, -torch.inf])
    assert torch.equal(wanted_shrinking(nothing, 100.0), torch.ones(6))
    assert torch.equal(wanted_shrinking(torch.tensor([400.0]), 100.0), torch.tensor([0.25]))


def test_negative_logits_leave_the_weights_alone() -> None:
    model = vit()
    attention = model.blocks[0].attention
    with torch.no_grad():
        attention.query.bias.fill_(3.0)
        attention.key.bias.fill_(-3.0)
        attention.query.weight.mul_(0.01)
        attention.key.weight.mul_(0.01)
    assert float(_max_logits(model, images()).max()) < 0
    before = copy.deepcopy(model.state_dict())
    stabilize_(model, "qk-clip:tau=0.001")
    _step(model, images())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_all_micro_batches_count_and_evaluation_does_not() -> None:
    small, large = 0.1 * images(), 3 * images()
    for batches in ((small, large), (large, small)):
        model = vit(norm="none")
        tau = 0.9 * float(_max_logits(model, large).min())
        weight = model.blocks[0].attention.query.weight.detach().clone()
        stabilize_(model, f"qk-clip:tau={tau!r}")
        model.eval()(large)
        model.train()
        _step(model, small)
        assert torch.equal(model.blocks[0].attention.query.weight, weight)
        _step(model, *batches)
        torch.testing.assert_close(_max_logits(model, large), torch.full((4,), tau, dtype=torch.float64))


def test_every() -> None:
    model = vit()
    stabilize_(model, "qk-clip:tau=0.01:every=3")
    sizes = []
    for _ in range(7):
        _step(model, images())
        sizes.append(float(_max_logits(model, images()).max()))
        with torch.no_grad():
            model.blocks[0].attention.query.weight.mul_(10)
    clipped = [size == pytest.approx(0.01) for size in sizes]
    assert clipped == [True, False, False, True, False, False, True]


def test_every_goes_on_where_a_checkpoint_left_it() -> None:
    first, second = vit(), vit()
    for model in (first, second):
        stabilize_(model, "qk-clip:tau=0.01:every=3")
    _step(second, images())  # its own count begins, and gives way to the one loaded
    for _ in range(2):
        _step(first, images())
    second.load_state_dict(first.state_dict())
    twin = copy.deepcopy(first)
    for model in (first, second, twin):
        with torch.no_grad():
            model.blocks[0].attention.query.weight.mul_(10)
        clipped = []
        for _ in range(2):
            _step(model, images())
            clipped.append(float(_max_logits(model, images()).max()) == pytest.approx(0.01))
        assert clipped == [False, True]


def test_watched_training_is_the_same(tmp_path: Path) -> None:
    models = [vit(depth=2), vit(depth=2)]
    for model in models:
        stabilize_(model, "qk-clip:tau=1")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        watch = tt.Watch(model, tmp_path / "run", every=1) if model is models[0] else None
        with watch or contextlib.nullcontext():
            for _ in range(4):
                optimizer.zero_grad()
                loss = model(images()).square().mean()
                loss.backward()
                optimizer.step()
                if watch is not None:
                    watch.step(loss)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)


def test_square_weights_stored_by_inputs() -> None:
    """The queries of GPT-2's cross-attention: a Conv1D whose shape does not tell which side the heads are on."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 12, "n_layer": 1, "n_head": 3, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = transformers.GPT2Config(vocab_size=17, bos_token_id=0, eos_token_id=0, add_cross_attention=True, **sizes)
    model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
    cross = next(each for each in projections(model) if "crossattention" in each.name)
    for rows in (cross.query, cross.key):
        nn.init.normal_(rows.layer.weight, std=0.5)
    memory = torch.randn(3, 4, 12)

    def max_logits() -> Tensor:
        with torch.no_grad():
            return calls_of(lambda: model(tokens(), encoder_hidden_states=memory))[-1].max_logits

    before, shrinking = max_logits(), torch.tensor([0.25, 1.0, 0.5])
    shrink_logits_(cross, shrinking)
    torch.testing.assert_close(max_logits(), before * shrinking)


def test_another_models_optimizer_changes_nothing() -> None:
    model, other = vit(), vit()
    stabilize_(model, "qk-clip:tau=0.01")
    before = copy.deepcopy(model.state_dict())
    model(images())
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    torch.optim.SGD([model.head.weight], lr=0.0).step()  # nor one that holds other weights of its own
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class _Around(torch.optim.Optimizer):
    """As SAM does it: an optimiser that has another take the step."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self) -> None:
        self.inner.step()


def test_an_optimizer_around_another_takes_one_step() -> None:
    model = vit()
    stabilize_(model, "qk-clip:tau=0.01:every=2")
    optimizer = _Around(torch.optim.SGD(model.parameters(), lr=0.0))
    clipped = []
    for _ in range(12):  # long enough to be told that nothing was seen
        _step(model, images(), optimizer=optimizer)
        clipped.append(float(_max_logits(model, images()).max()) == pytest.approx(0.01))
        with torch.no_grad():
            model.blocks[0].attention.query.weight.mul_(10)
    assert clipped == [True, False] * 6


def test_weights_in_two_optimizers() -> None:
    model = vit(depth=2)
    stabilize_(model, "qk-clip:tau=0.01:every=2")
    optimizers = [torch.optim.SGD(block.parameters(), lr=0.0) for block in model.blocks]
    for _ in range(3):
        model(images())
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            first, second = (call.max_logits for call in calls_of(lambda: model(images())))
    assert float(first.max()) == pytest.approx(0.01)
    # its inputs have changed with the first block's attention, so not to the last digit
    assert float(second.max()) == pytest.approx(0.01, rel=0.05)


def test_a_copy_clips_itself_from_its_first_step_and_the_original_not() -> None:
    model = vit()
    stabilize_(model, "qk-clip:tau=0.01")
    before = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model)
    _step(twin, images())
    assert float(_max_logits(twin, images()).max()) == pytest.approx(0.01)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_nothing_holds_a_model_that_is_gone() -> None:
    model = vit()
    stabilize_(model, "qk-clip")
    _step(model, images())
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    other = vit()
    _step(other, images())  # and the hook has nothing to do


def test_attention_that_never_shows_is_told() -> None:
    model = _ByHand()
    stabilize_(model, "qk-clip")
    for _ in range(4):
        _step(model, torch.randn(2, 3, 8))
    with pytest.warns(UserWarning, match="has not seen the attention of the model in 5 steps"):
        _step(model, torch.randn(2, 3, 8))
    _step(model, torch.randn(2, 3, 8))  # told once


class _ByHand(nn.Module):
    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.query(x) @ self.key(x).mT).softmax(-1) @ x


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_compiled(in_place: bool, told: bool) -> None:
    model = vit()
    stabilize_(model, "qk-clip:tau=0.01")
    torch._dynamo.reset()
    program = model if in_place else torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
    if told:
        see_compiled_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    clipped = []
    for _ in range(2):
        program(images())
        optimizer.step()
        with torch.compiler.set_stance("force_eager"):
            clipped.append(float(_max_logits(model, images()).max()) == pytest.approx(0.01))
    assert clipped == [told, True]  # untold, it shows after the first step


def _clips_in_each_process(rank: int) -> None:
    model, alone = vit(norm="none"), vit(norm="none")
    largest = 2 * images()
    for each in (model, alone):
        stabilize_(each, "qk-clip:tau=0.01")
    batches = [largest, 0.1 * images()]
    _step(model, batches[rank])
    _step(alone, *batches)
    assert torch.equal(model.blocks[0].attention.query.weight, alone.blocks[0].attention.query.weight)
    assert float(_max_logits(model, largest).max()) == pytest.approx(0.01)

    _clips_shards()


def _clips_shards() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    plain, sharded = vit(), vit()
    mesh = init_device_mesh("cpu", (2,))
    for model in (plain, sharded):
        stabilize_(model, f"qk-clip:tau={_between(_max_logits(plain, images()))!r}")
    fully_shard(sharded.blocks[0], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for model in (plain, sharded):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        model(images()).sum().backward()
        optimizer.step()
    assert not torch.equal(plain.blocks[0].attention.query.weight, vit().blocks[0].attention.query.weight)
    for name, parameter in sharded.named_parameters():
        assert isinstance(parameter, DTensor)
        torch.testing.assert_close(parameter.full_tensor(), plain.get_parameter(name), rtol=1e-12, atol=0)


def test_the_largest_of_two_processes_counts_and_shards_are_scaled() -> None:
    in_processes(2, _clips_in_each_process)


@pytest.mark.parametrize("spec", ["qk-clip:tau=0", "qk-clip:every=0"])
def test_options_out_of_range(spec: str) -> None:
    with pytest.raises(RecipeError, match="qk-clip"):
        parse(spec)
