"""Reference models, each one readable file."""

from trimtab.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from trimtab.models.generation import generate
from trimtab.models.gpt import GPT, GPTConfig
from trimtab.models.speech_encoder import SpeechEncoder, SpeechEncoderConfig
from trimtab.models.vit import ViT, ViTConfig, vit_config

__all__ = [
    "GPT",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "GPTConfig",
    "SpeechEncoder",
    "SpeechEncoderConfig",
    "ViT",
    "ViTConfig",
    "generate",
    "vit_config",
]
