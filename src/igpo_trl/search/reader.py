"""An earlier path of the page reader. Import these names from `igpo_trl.search`."""

from .network.pages import PageReader as PageReader
from .network.pages import ReadPageTool as ReadPageTool
