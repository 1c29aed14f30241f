"""The page of a run: what it learned, which questions it lost, and every rollout with what the policy believed."""

from .compact import MAX_ROLLOUTS, page_data
from .document import render_page, write_page

__all__ = ["MAX_ROLLOUTS", "page_data", "render_page", "write_page"]
