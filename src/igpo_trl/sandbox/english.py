"""The world in English, see `igpo_trl.data.english`: it is made where questions are loaded by name."""

from ..data.english import EnglishWorld as EnglishWorld
from ..data.english import make_world as make_world
from ..data.english import write_world as write_world
