"""Runs at the start of every Python process that has this folder in PYTHONPATH.

Compiles the one module that `LWZ_GUARD` describes ({"module", "guard", "without"}) with its guard
taken out, in the process and in those that it starts. No file changes and no bytecode is written.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys

MUTATION = json.loads(os.environ["LWZ_GUARD"])


class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        source = self.get_data(self.path).decode()
        assert source.count(MUTATION["guard"]) == 1, f"{self.path} does not have this guard once"
        return compile(source.replace(MUTATION["guard"], MUTATION["without"]), self.path, "exec")


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname != MUTATION["module"]:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.origin:
                return importlib.util.spec_from_file_location(
                    fullname, spec.origin, loader=Loader(fullname, spec.origin)
                )
        return None


sys.meta_path.insert(0, Finder())
