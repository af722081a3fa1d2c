"""What is logged."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from simpletuner.config.options import Section, option

__all__ = ["Reporting"]


class Reporting(Section):
    """What is logged, and how often."""

    log_step_interval: int = option(10, ge=1)
    """Report loss, learning rate, gradient norm and speed every so many optimiser steps."""

    log_level: Literal["debug", "info", "warning", "error"] = option("info")
    """How much the console tells; the libraries beneath are as quiet or as talkative."""

    webhook_config: dict[str, Any] | tuple[dict[str, Any], ...] | str | None = option(None, path="input")
    """Who is told of the run while it goes: an object, a list of them, or a JSON file of either. Keys: `webhook_type`
    (`discord` or `raw`), `webhook_url` or `callback_url`, `message_prefix`, `log_level`, `auth_token`, `ssl_no_verify`.
    Secrets are best written as `{env:NAME}`."""

    @field_validator("webhook_config")
    @classmethod
    def _is_no_address(cls, value: Any) -> Any:
        """An address alone would be looked for as a file, and named in the message."""
        if isinstance(value, str) and "://" in value:
            raise ValueError('An address stands in an object: {"webhook_url": "https://..."}.')
        return value
