"""
The routes of `gaml-serve` by replicas on the machines of a Ray cluster, with Ray Serve.

    serve run gaml_hf.runtime.ray_app:app model=/shared/sst2 num_replicas=4 slo_ms=200

Each replica is a whole server, with its own queue, batches, exit cap and metrics; Ray gives each request to one.
"""

import dataclasses
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import Field, create_model
from ray import serve

from gaml_score import _commit

from .ort import is_export as is_onnx_export
from .scoring import ClassifierLoader
from .serving import LIVE, Refusal, ServerSettings, make_app


@serve.deployment(health_check_period_s=10, health_check_timeout_s=60)
@serve.ingress()
class Classifier:
    """
    A replica.

    Args:
        load ([`ClassifierLoader`]): makes the pipeline.
        settings ([`ServerSettings`]): the knobs, where `user_config` does not name them.
    """

    def __init__(self, load: ClassifierLoader, settings: ServerSettings):
        self.load, self.settings = load, settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        # No token: `PUT /config` would change the knobs of the replica that it comes to.
        app = make_app(self.load, self.settings, name=self.load.model)
        self.service = app.state.service
        return app

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over the live knobs of `user_config`; those that it leaves out are as at the start."""
        await self._loaded()
        if not isinstance(user_config, dict):
            raise ValueError(f"`user_config` must be an object of knobs. Got {user_config!r}.")
        try:
            self.service.change({name: getattr(self.settings, name) for name in LIVE} | user_config)
        except Refusal as refusal:
            raise ValueError(f"`user_config`: {refusal}") from None

    async def check_health(self) -> None:
        """Raise where the replica should be replaced."""
        await self._loaded()
        try:
            await self.service.check_health()
        except Refusal as refusal:
            raise RuntimeError(str(refusal)) from None

    async def _loaded(self) -> None:
        await self.service.loading
        if self.service.failure is not None:
            raise RuntimeError(f"The model could not be loaded: {self.service.failure}")


# What follows `serve run ...:app`, or stands under `args` of a Serve config file.
Arguments = create_model(
    "Arguments",
    __config__={"extra": "forbid", "protected_namespaces": ()},
    model=(str, ...),
    revision=(str | None, None),
    device=(str | None, None),
    num_threads=(int | None, Field(None, ge=1)),
    prepack=(bool, True),
    num_replicas=(int, Field(1, ge=1)),
    num_cpus=(float, Field(1.0, ge=0)),
    num_gpus=(float, Field(0.0, ge=0)),
    **{field.name: (field.type, field.default) for field in dataclasses.fields(ServerSettings)},
)


def app(arguments: Arguments) -> serve.Application:
    """
    The application.

    Args:
        arguments (`Arguments`):
            `model`, a folder that all machines see, or a name on the Hub, and `revision` of that; `device`,
            `num_threads` and `prepack`, as of `gaml-serve`; `num_replicas`, and `num_cpus` (also the threads, where
            `num_threads` is left out) and `num_gpus` of each; and the knobs, [`ServerSettings`].

    Raises:
        ValueError: one of them is unknown, of another kind, or out of range.
    """
    settings = ServerSettings(**{name: getattr(arguments, name) for name in ServerSettings.__dataclass_fields__})
    model, is_folder = arguments.model, Path(arguments.model).is_dir()
    if is_folder:
        model = str(Path(model).absolute())  # a replica has a working folder of its own
    is_export = is_folder and is_onnx_export(model)
    device = arguments.device or ("cuda" if arguments.num_gpus and not is_export else "cpu")
    prepack = arguments.prepack and device == "cpu" and not is_export
    # One for all replicas, those to come too, whatever is pushed meanwhile.
    revision = _commit(model, arguments.revision)
    return Classifier.options(
        num_replicas=arguments.num_replicas,
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
        # The replica itself refuses what is too much for it, and says so; Ray would let it wait.
        max_ongoing_requests=2 * settings.max_concurrent_requests,
    ).bind(ClassifierLoader(model, is_export, device, arguments.num_threads, prepack, revision), settings)


__all__ = ["app"]
