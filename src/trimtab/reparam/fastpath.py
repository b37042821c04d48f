"""nn.TransformerEncoderLayer's evaluation fast path, which reads weights past every forward, switched off and on.

torch decides by attributes: a layer takes the path only while ``activation_relu_or_gelu`` is set, the encoder turns
its input into nested tensors only while ``use_nested_tensor`` is. Neither changes what the layer computes.
"""

from torch import nn

from trimtab.reparam.layers import Reparametrized

_MEMORY = "_fast_path_before"


def switch_off_(model: nn.Module) -> None:
    """Switch the fast path off in every encoder layer and encoder with a converted layer, a hook or a lost norm."""
    if isinstance(model, Reparametrized) and keep_out not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(keep_out)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder) and _must_be_off(module):
            name = _switch(module)
            if _MEMORY not in module.__dict__:
                module.__dict__[_MEMORY] = getattr(module, name)
            setattr(module, name, False)


def keep_out(module: nn.Module, args: object) -> None:
    """Do nothing, as a forward pre-hook: an encoder layer takes its fast path only while no part of it has hooks.

    For a layer converted by itself, whose encoder layer, if it sits in one, cannot be seen from it.
    """


def restore_(model: nn.Module) -> None:
    """Give the fast path back to layers that hold no converted layer or hook any more and still have their norms."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is keep_out:
            del model._forward_pre_hooks[key]
    for module in model.modules():
        if _MEMORY in module.__dict__ and not _must_be_off(module):
            setattr(module, _switch(module), module.__dict__.pop(_MEMORY))


def _switch(module: nn.Module) -> str:
    return "use_nested_tensor" if isinstance(module, nn.TransformerEncoder) else "activation_relu_or_gelu"


def _must_be_off(module: nn.Module) -> bool:
    layers = [m for m in module.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    lost_a_norm = any(
        not isinstance(layer.norm1, nn.LayerNorm) or not isinstance(layer.norm2, nn.LayerNorm) for layer in layers
    )
    # A layer with hooks takes no fast path, but the encoder would still hand it nested tensors, which it cannot use.
    return lost_a_norm or any(isinstance(m, Reparametrized) or m._forward_hooks for m in module.modules())
