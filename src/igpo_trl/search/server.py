"""An earlier path of the search server. Import these names from `igpo_trl.search`."""

from .network.server import create_app as create_app
from .network.server import serve as serve
