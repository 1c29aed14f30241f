"""
Transcripts, plots and the page of rollouts.

All are made from [`Trajectory`] records, without torch and TRL. Plots need the extra `plots`, the page needs `page`.
"""

from .plots import plot_curves, plot_rollout
from .terminal import render_belief, render_observation, render_trajectory, render_turn
from .text import Piece, beliefs_after, format_belief, format_gain, pieces, plain_text, question_text, worth_reading

__all__ = [
    "Piece",
    "beliefs_after",
    "format_belief",
    "format_gain",
    "pieces",
    "plain_text",
    "plot_curves",
    "plot_rollout",
    "question_text",
    "render_belief",
    "render_observation",
    "render_trajectory",
    "render_turn",
    "worth_reading",
]
