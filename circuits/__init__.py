"""Which parts of a model do two tasks share, and what happens without them?

Names are imported when they are first used, so that ``import circuits`` is quick; ``__init__.pyi`` lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
