"""Loaded models: backends on their device threads, shared by the engines of the process."""

from d2f_runtime.loaded_model.cache import MODELS, ModelCache
from d2f_runtime.loaded_model.model import LoadedModel, Opened, SlotOwner
from d2f_runtime.loaded_model.parts import ModelKey, ModelParts

__all__ = ["MODELS", "LoadedModel", "ModelCache", "ModelKey", "ModelParts", "Opened", "SlotOwner"]
