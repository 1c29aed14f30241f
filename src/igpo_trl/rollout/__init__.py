"""Multi-turn rollouts: the loop, tool calls and their results, observations, and the KV cache between turns."""

from .tool_calls import ToolCall, read_calls
from .tool_results import ToolErrorKind, ToolResult
from .tool_runner import ToolRunner

__all__ = ["ToolCall", "ToolErrorKind", "ToolResult", "ToolRunner", "read_calls"]
