"""Python imports this when it starts, where its directory is on PYTHONPATH: see `faulty.py` beside the directory."""

import importlib.util
import os
import sys

_path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "faulty.py")
_spec = importlib.util.spec_from_file_location("faulty_storage", _path)
_module = importlib.util.module_from_spec(_spec)
sys.modules["faulty_storage"] = _module
_spec.loader.exec_module(_module)
_module.install_from_environment(sys.orig_argv[1:])
