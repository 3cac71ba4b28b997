"""The configuration as other code uses it: its dataclass, and as JSON or YAML and back. Options are in options/."""

from trainer.options.config import Config, choice_of, is_free, method_name
from trainer.options.stored import as_json, as_yaml, flatten, from_json

__all__ = ["Config", "as_json", "as_yaml", "choice_of", "flatten", "from_json", "is_free", "method_name"]
