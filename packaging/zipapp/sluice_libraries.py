"""The libraries of the single file, all in one member of it.

The interpreter reads the list of an archive at each start, which costs it 20 microseconds an entry.
The program form and the launcher, which are started for each call, use no library. So the libraries
are one entry, which is read when something is imported that nobody else knows.
"""

import importlib.util
import marshal
import os
import sys

MEMBER = "libraries"


class Finder:
    """Finds and loads what is in the member: name -> (package or not, source, compiled)."""

    def __init__(self, place):
        """Take the archive, or the directory into which it was unpacked."""
        self.place = place
        self.table = None

    def _modules(self):
        if self.table is None:
            path = f"{self.place}/{MEMBER}"
            if os.path.isfile(path):
                with open(path, "rb") as stream:
                    data = stream.read()
            else:
                import zipimport

                data = zipimport.zipimporter(self.place).get_data(path)
            # As trustworthy as the archive, which holds the program itself.
            self.magic, self.table = marshal.loads(data)  # noqa: S302
        return self.table

    def find_spec(self, name, path=None, target=None):
        """Return where a module comes from, None for one that is not here."""
        if name.startswith("sluice") or name not in self._modules():
            return None
        package = self.table[name][0]
        origin = f"{self.place}/{MEMBER}/{name}"
        return importlib.util.spec_from_loader(name, self, origin=origin, is_package=package)

    def create_module(self, spec):
        """Leave it to the interpreter."""
        return

    def exec_module(self, module):
        """Run a module; compiled already, if for this version of Python."""
        _, source, compiled = self.table[module.__name__]
        if self.magic == importlib.util.MAGIC_NUMBER:
            code = marshal.loads(compiled)  # noqa: S302
        else:
            code = compile(source, module.__spec__.origin, "exec", dont_inherit=True)
        exec(code, vars(module))  # noqa: S102

    def get_source(self, name):
        """Return the text of a module, for tracebacks."""
        return self._modules()[name][1].decode()


def install():
    """Let imports look there, after everywhere else."""
    place = os.path.dirname(os.path.abspath(__file__))
    sys.meta_path.append(Finder(place))
