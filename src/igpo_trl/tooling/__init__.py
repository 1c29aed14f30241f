"""All tool calls of all rollouts of one round, run together.

A bad call is data, not a crash: whatever a policy sends and whatever a tool does ends as a text for the policy to
read, with a named kind of error to count. Only `KeyboardInterrupt` and errors of the program itself are raised.
"""

from .._tool_options import ToolOptions, tool
from .calls import ToolCall, read_calls
from .results import ToolErrorKind, ToolResult
from .runner import ToolRunner

__all__ = ["ToolCall", "ToolErrorKind", "ToolOptions", "ToolResult", "ToolRunner", "read_calls", "tool"]
