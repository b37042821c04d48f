"""What reaches `scaled_dot_product_attention` in one forward, and small models whose heads lie in many orders."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.models import ViT, ViTConfig


class Call(NamedTuple):
    """Query (B, H, L, D), key and value (B, H, S, D), keys and values already repeated, and the other arguments."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]

    @property
    def max_logits(self) -> Tensor:
        """The largest logit of each head, (H,), by its definition."""
        logits = self.query @ self.key.mT * (self.options.get("scale") or self.query.shape[-1] ** -0.5)
        if self.options.get("is_causal"):
            logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        mask = self.options.get("attn_mask")
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        return logits.amax((0, 2, 3))


def calls_of(run: Callable[[], object]) -> list[Call]:
    """Every call of torch's attention function while `run` runs."""
    original, calls = F.scaled_dot_product_attention, []

    def spy(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = ("attn_mask", "dropout_p", "is_causal")
        options = dict(zip(names, args, strict=False)) | kwargs
        group = query.shape[-3] // key.shape[-3]
        k, v = (each.detach().clone().repeat_interleave(group, -3) for each in (key, value))
        calls.append(Call(query.detach().clone(), k, v, options))
        return original(query, key, value, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        run()
    return calls


def vit(depth: int = 1, **options: Any) -> nn.Module:
    sizes = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 5, "dim": 24, "num_heads": 4}
    torch.manual_seed(0)
    return ViT(ViTConfig(**sizes, depth=depth, init="normal", init_std=0.4, **options)).double()


def images() -> Tensor:
    return torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def language_model(kind: str) -> nn.Module:
    """A Hugging Face model of one layer, with large weights so that its heads differ; kind is a key of `KINDS`."""
    transformers = pytest.importorskip("transformers")
    name, options = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(vocab_size=17, bos_token_id=0, eos_token_id=0, **options)
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, name + suffix)._from_config(config, attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5)
    return model.train()


_LLAMA = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
_NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    # q | k | v in a Conv1D
    "gpt2": (
        "GPT2",
        {"n_embd": 24, "n_layer": 1, "n_head": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
    # three layers, two query heads for each key head
    "llama": ("Llama", {**_LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2}),
    # q | k | v in one layer, of unequal sizes
    "phi3": ("Phi3", {**_LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}),
    # q1 k1 v1 | q2 k2 v2 ...
    "gpt-neox": ("GPTNeoX", {**_LLAMA, "num_attention_heads": 4, **_NO_DROPOUT}),
    # q1 q2 k1 v1 | q3 q4 k2 v2
    "falcon": (
        "Falcon",
        {
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            **_NO_DROPOUT,
        },
    ),
    # all queries, then one key and one value
    "gpt-bigcode": (
        "GPTBigCode",
        {"n_embd": 24, "n_layer": 1, "n_head": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
}


def tokens() -> Tensor:
    return torch.randint(17, (3, 7), generator=torch.Generator().manual_seed(1))
