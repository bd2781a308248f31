"Exercises that answer at once: check.<name>(your_function) says right, or which mistake it was; found by name in here."
import importlib.util

from .quiz import quiz
from .verdict import Mistake, judge

_ROOMS = (".diffusion", ".denoising", ".building", ".reward", ".truncation", ".policy_gradient", ".tuning", ".people",
          ".algorithms", ".learning")

def __getattr__(name):
    for room in _ROOMS if not name.startswith("_") else ():
        try: module = importlib.import_module(room, __name__)
        except ModuleNotFoundError as error:
            if error.name != importlib.util.resolve_name(room, __name__): raise
            continue # a room that is not built
        if name in module.__all__: return getattr(module, name)
    raise AttributeError(f"there is no check {name!r}; dir(check) lists them")

def __dir__():
    names = {"quiz", "judge", "Mistake"}
    for room in _ROOMS: names.update(n for n in importlib.import_module(room, __name__).__all__ if n.islower())
    return sorted(names)
