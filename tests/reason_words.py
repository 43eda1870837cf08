"""Every word with which our code says why something did not go as planned, read from the source.

Words stand as literals in the calls, assignments and answers named below. A new one that is written in another way is
not found; then name its place here.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("disagg_plugin/control", "disagg_plugin/kv", "connectors/disagg_vllm", "policies/disagg_policies")
CALLS = frozenset(
    {
        *("_fail", "fail", "_abandon", "_drop", "_break", "lose", "_leave", "disconnect", "_drop_link", "refuse_all"),
        *("ReceiveBroken", "SendBroken", "PrefillFailed", "TicketCancelled", "PeerLeft", "PeerLost", "Refused"),
        *("Local", "PrefillLocally", "_stay", "Cancel", "failed", "cancel", "Mismatch", "_give_up", "give_up"),
    }
)
ANSWERS = frozenset(
    {"_refusal", "_ready_to_hand_over", "_ask", "_prefill", "local_only_reason", "_offload", "find_mismatch", "_stays"}
)
NOT_REASONS = frozenset({"local_ttft_s", "remote_ttft_s"})
WORD = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)+")


def reason_words() -> dict[str, str]:
    """Each word, and the file where it stands first."""
    found: dict[str, str] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.py")):
            for word in _words(ast.parse(path.read_text())):
                found.setdefault(word, str(path.relative_to(ROOT)))
    return found


def _words(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func) in CALLS:
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            yield from _literals(values)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in ANSWERS:
            body = ast.Module(body=node.body, type_ignores=[])
            yield from _literals([inner for inner in ast.walk(body) if isinstance(inner, ast.Constant)])
        elif isinstance(node, ast.Assign) and any(_name(target) == "reason" for target in node.targets):
            yield from _literals([node.value])


def _literals(nodes: list[ast.expr] | list[ast.Constant]) -> Iterator[str]:
    for node in nodes:
        branches = [node.body, node.orelse] if isinstance(node, ast.IfExp) else [node]
        for branch in branches:
            word = branch.value if isinstance(branch, ast.Constant) else None
            if isinstance(word, str) and WORD.fullmatch(word) and word not in NOT_REASONS:
                yield word


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
