"""What the server of processes imports, where garbage collection neither looks through it nor copies it."""

import gc
import importlib

gc.disable()
for name in ('tests.support.launching', 'sklearn.datasets'):  # the second for the digits
    importlib.import_module(name)
gc.freeze()
gc.enable()
