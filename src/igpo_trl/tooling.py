"""Tools of an agent: the decorator, and running tool calls without a trainer."""

from .rollout import ToolCall, ToolErrorKind, ToolResult, ToolRunner, read_calls
from .tools import ToolOptions, tool

__all__ = ["ToolCall", "ToolErrorKind", "ToolOptions", "ToolResult", "ToolRunner", "read_calls", "tool"]
