"""vLLM asks for a name once and keeps the answer; this makes it ask again when a vector was replaced under its name."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from vllm.lora.resolver import LoRAResolverRegistry

from .playground import add_playground
from .resolver import SteeringResolver
from .settings import PLUGIN

if TYPE_CHECKING:
    from argparse import Namespace

    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger(f"vllm.{PLUGIN}")


class EndpointPlugin:
    """What vLLM's entry point `vllm.endpoint_plugins` takes."""

    name = PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the playground, and look at the vectors before each request."""
        add_playground(app)
        app.add_middleware(Middleware)

    async def init_state(self, engine_client: object, state: object, args: Namespace) -> None:
        """Nothing is kept in the server's state."""


class Middleware:
    """Before each POST, take the names out of vLLM's memory whose vector was replaced."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] == "http" and scope["method"] == "POST":
            models = getattr(scope["app"].state, "openai_serving_models", None)
            if models is not None:
                await asyncio.to_thread(forget_replaced, models)
        await self.app(scope, receive, send)


def forget_replaced(models: Any) -> None:
    """Take names out of `OpenAIServingModels.lora_requests`; requests that run keep the adapter they have."""
    if PLUGIN not in LoRAResolverRegistry.get_supported_resolvers():
        return
    resolver = LoRAResolverRegistry.get_resolver(PLUGIN)
    if isinstance(resolver, SteeringResolver):
        for name in resolver.replaced(list(models.lora_requests)):
            models.lora_requests.pop(name, None)
            log.info("weightsteer: %r was replaced; it is loaded anew", name)
