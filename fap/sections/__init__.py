"""The sections of the config: every field with its default, its meaning and its unit.

A combination without meaning is a ValueError that names the field, the value and what is allowed.
The semantics of each field are those of the paper and of its authors' code (docs/semantics.md).
"""

from fap.sections.budget import BudgetConfig
from fap.sections.data import DataConfig
from fap.sections.method import MethodConfig
from fap.sections.model import ModelConfig
from fap.sections.optim import OptimConfig
from fap.sections.run import RunConfig

__all__ = ["BudgetConfig", "DataConfig", "MethodConfig", "ModelConfig", "OptimConfig", "RunConfig"]
