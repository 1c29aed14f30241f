"""Answer probes, under the name that earlier code imports."""

from .beliefs.probes import DEFAULT_TEMPLATE, NO_THINK_TEMPLATE, AnswerProbe, build_probes

__all__ = ["DEFAULT_TEMPLATE", "NO_THINK_TEMPLATE", "AnswerProbe", "build_probes"]
