"""Reference models, each one readable file."""

from trimtab.models.dlinear import DLinear
from trimtab.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from trimtab.models.forecast_transformer import ForecastTransformer
from trimtab.models.forecasting import ForecastModelConfig, make_forecast_model
from trimtab.models.generation import generate
from trimtab.models.gpt import GPT, GPTConfig
from trimtab.models.itransformer import ITransformer
from trimtab.models.revin import RevIN
from trimtab.models.samformer import SAMformer
from trimtab.models.speech_encoder import SpeechEncoder, SpeechEncoderConfig
from trimtab.models.tsmixer import TSMixer
from trimtab.models.vit import ViT, ViTConfig, vit_config

__all__ = [
    "GPT",
    "DLinear",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "ForecastModelConfig",
    "ForecastTransformer",
    "GPTConfig",
    "ITransformer",
    "RevIN",
    "SAMformer",
    "SpeechEncoder",
    "SpeechEncoderConfig",
    "TSMixer",
    "ViT",
    "ViTConfig",
    "generate",
    "make_forecast_model",
    "vit_config",
]
