"""The configuration: one schema for YAML files, overrides, the documentation and editors.

`load_config` turns a file and `key.path=value` overrides into a `Config`, or raises `ConfigError` with every problem.
"""

from glm_training.config.docs.describe import Key
from glm_training.config.docs.reference import (
    compared,
    config_diff,
    docs_table,
    iter_keys,
    json_schema,
    keys,
    leaves,
    resolved_yaml,
    update_docs,
)
from glm_training.config.errors import ConfigError, Problem
from glm_training.config.loading.load import load_config
from glm_training.config.schema import Config
from glm_training.config.sections.base import Part
from glm_training.config.sections.resolved import (
    ResolvedLora,
    ResolvedOptimizer,
    ResolvedPolicy,
    ResolvedSampling,
    RolloutGroup,
)

__all__ = [
    "Config",
    "ConfigError",
    "Key",
    "Part",
    "Problem",
    "ResolvedLora",
    "ResolvedOptimizer",
    "ResolvedPolicy",
    "ResolvedSampling",
    "RolloutGroup",
    "compared",
    "config_diff",
    "docs_table",
    "iter_keys",
    "json_schema",
    "keys",
    "leaves",
    "load_config",
    "resolved_yaml",
    "update_docs",
]
