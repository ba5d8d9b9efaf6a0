"""What a run is: sections as pydantic models, read from YAML with dotted overrides. Imports no torch."""

from moe_llm.config.data import SourceConfig
from moe_llm.config.load import dump_config, load_config
from moe_llm.config.model import ModelConfig
from moe_llm.config.schema import Config

__all__ = ["Config", "ModelConfig", "SourceConfig", "dump_config", "load_config"]
