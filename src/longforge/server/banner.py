"""What `longforge serve` prints when it is ready: where it is, how to try it, what it runs on and holds."""

import json
import shlex
from dataclasses import dataclass

__all__ = ["Features", "ServerFacts", "banner", "capacity", "draining"]

CHAT_TOKENS = 8192
"""Tokens of the conversations in which capacity is told."""
LABEL = 11


@dataclass(frozen=True)
class Features:
    """What is switched on beside plain generation."""

    sparse_blocks: int = 0
    """Blocks that a sparse layer selects; 0 without sparse layers."""
    prefix_cache: bool = False
    draft_tokens: int = 0
    """Tokens that MTP modules draft per step."""
    constrained: bool = False
    """JSON schemas, grammars and tool calls that cannot be malformed."""
    tiers: tuple[str, ...] = ()
    """Where pages go that the pool has no room for, nearest first."""
    api_keys: int = 0
    """Keys that open the server; 0: it asks for none."""

    def words(self) -> list[str]:
        """One entry per feature that is on."""
        entries = [
            (self.sparse_blocks > 0, f"MSA ({self.sparse_blocks} blocks a token)"),
            (self.prefix_cache, "prefix cache"),
            (self.draft_tokens > 0, f"MTP speculation ({self.draft_tokens} drafted)"),
            (self.constrained, "constrained output"),
            (bool(self.tiers), f"tiers ({', '.join(self.tiers)})"),
            (self.api_keys > 0, f"API keys ({self.api_keys})"),
        ]
        return [text for on, text in entries if on]


@dataclass(frozen=True)
class ServerFacts:
    """A ready server, in plain values."""

    model: str
    url: str
    """Base URL, without /v1."""
    context: int
    pages: int
    page_tokens: int
    threads: int
    threads_why: str
    placement: str
    features: Features = Features()
    notices: tuple[str, ...] = ()
    """Whole sentences that the user should know before the first request."""


def banner(facts: ServerFacts) -> str:
    """All lines. The first one is also read by programs: it holds ` at URL/v1`."""
    first = (
        f"longforge serves {facts.model} at {facts.url}/v1 (context {facts.context}, "
        f"{facts.pages} pages of {facts.page_tokens} tokens, "
        f"{_counted(facts.threads, 'thread')}); Ctrl-C stops it"
    )
    url = _reachable(facts.url)
    key = "YOUR-KEY" if facts.features.api_keys else "none"
    rows = [
        ("web page", f"{url}/"),
        ("try it", _curl(facts, url)),
        ("OpenAI", f"export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key}"),
        ("Anthropic", f"export ANTHROPIC_BASE_URL={url} ANTHROPIC_API_KEY={key}"),
        ("computes", facts.placement),
        ("threads", f"{facts.threads}: {facts.threads_why}"),
        ("holds", capacity(facts.pages, facts.page_tokens, facts.context)),
        ("active", ", ".join(facts.features.words()) or "plain generation"),
        *(("notice", notice) for notice in facts.notices),
    ]
    return "\n".join([first, *(f"  {label:{LABEL}}{text}" for label, text in rows)])


def capacity(pages: int, page_tokens: int, context: int) -> str:
    """What a pool holds, in tokens and in conversations of 8K tokens, or of the context where it is
    shorter."""
    chat = min(CHAT_TOKENS, context)
    chats = pages // -(-chat // page_tokens)
    kind = "full context" if chat == context else "chat"
    return f"{pages * page_tokens:,} tokens: {_counted(chats, kind)} of {chat:,} tokens at once"


def draining(answers: int, seconds: float) -> str:
    """What is said after the first signal while answers are still open."""
    limit = "" if seconds == float("inf") else f", in {seconds:g} s at the latest"
    return f"draining: ends with its {_counted(answers, 'open answer')}{limit}; Ctrl-C again ends it now"


def _curl(facts: ServerFacts, url: str) -> str:
    body = {"model": facts.model, "messages": [{"role": "user", "content": "Hello"}]}
    key = "-H 'Authorization: Bearer YOUR-KEY' " if facts.features.api_keys else ""
    return (
        f"curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )


def _reachable(url: str) -> str:
    """A server that listens on every address is reached from here on the loopback one."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"
