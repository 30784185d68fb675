"""Having a version ready, and telling of it: as it was before it was replaced, or loaded anew; or why it cannot be had.

Which tables name it, and what goes for it, is left to whoever wants the version.
"""

from __future__ import annotations

import structlog

from server.control.loading import Loader
from server.control.mending import Mending
from server.control.retiring import Retired, Retirement
from server.control.sources import Audit, ModelPlan, VersionPlan
from server.control.versions import UNAVAILABLE, KnownVersion, Prepared, loaded_version, serving
from server.errors import ModelLoadError, TidegateError
from server.gateway import Gateway
from server.runtime.upstream_options import UpstreamOptions
from server.types import ModelSpec

log = structlog.get_logger("control")


class Readying:
    """Makes plans of versions into versions that are ready; ``mending`` is woken for those that were not reached."""

    def __init__(
        self, loader: Loader, retirement: Retirement, mending: Mending, gateway: Gateway, audit: Audit
    ) -> None:
        self._loader = loader
        self._retirement = retirement
        self._mending = mending
        self._gateway = gateway
        self._audit = audit

    def ready_again(self, plan: ModelPlan, wanted: VersionPlan) -> KnownVersion | None:
        """The version as it was before it was replaced, if it is still loaded; tells of it."""
        retired = self._retirement.take_back(plan.name, wanted.version, wanted.fingerprint)
        if retired is None:
            return None
        self.serves_again(retired)
        return serving(retired.version)

    async def loaded_anew(self, plan: ModelPlan, wanted: VersionPlan) -> KnownVersion:
        """Load one version and tell of it. Raises TidegateError."""
        admitted = await self._loader.load(plan, wanted, self._champion(plan.name))
        served = await self._loader.serve(admitted)
        facts = admitted.facts()
        log.info("model_ready", model=plan.name, version=wanted.version, **facts)
        report = {} if admitted.report is None else {"admission": admitted.report.to_json()["checks"]}
        self._audit("model.ready", f"{plan.name}:{wanted.version}", facts | report)
        return serving(loaded_version(wanted, admitted, served))

    def _champion(self, model: str) -> ModelSpec | None:
        """What callers of this model are used to now."""
        routes = self._gateway.table.models.get(model)
        return None if routes is None else routes.versions[routes.stable].spec

    def load_failed(
        self, plan: ModelPlan, wanted: VersionPlan, version: KnownVersion, reason: str, before: str = ""
    ) -> None:
        """Keep and tell why it failed, and see that what was not reached is tried again.

        ``before``: why it could not be loaded the last time; the same reason is not audited again.
        """
        version.reason = reason
        if reason != before:
            self._audit("model.refused", f"{plan.name}:{version.number}", {"reason": reason})
        if version.served is None:
            version.state = UNAVAILABLE
            version.unreached = isinstance(wanted.origin, UpstreamOptions)
        if version.unreached:
            self._mending.wake()
        log.error(
            "model_load_failed",
            model=plan.name,
            version=version.number,
            error=reason,
            still_serving=version.served is not None,
        )

    def serves_again(self, retired: Retired) -> None:
        """Tell of a version that serves again without having been loaded."""
        version = retired.version
        log.info("model_ready", model=version.model, version=version.number, kept_warm=True)
        self._audit("model.ready", f"{version.model}:{version.number}", {"kept_warm": True})

    async def prepared_version(self, prepared: Prepared, plan: ModelPlan, wanted: VersionPlan) -> KnownVersion:
        """A version for a configuration to be. Raises ModelLoadError that names it."""
        return self._warm_version(prepared, plan, wanted) or await self._load_fresh(plan, wanted)

    def _warm_version(self, prepared: Prepared, plan: ModelPlan, wanted: VersionPlan) -> KnownVersion | None:
        """The version as it was before it was replaced, if it is still loaded."""
        retired = self._retirement.take_back(plan.name, wanted.version, wanted.fingerprint)
        if retired is None:
            return None
        prepared.taken_back.append(retired)
        return serving(retired.version)

    async def _load_fresh(self, plan: ModelPlan, wanted: VersionPlan) -> KnownVersion:
        log.info("model_loading", model=plan.name, version=wanted.version)
        try:
            admitted = await self._loader.load(plan, wanted, None)
            served = await self._loader.serve(admitted)
        except TidegateError as error:
            self._audit("model.refused", f"{plan.name}:{wanted.version}", {"reason": error.message})
            why = f"model '{plan.name}' version {wanted.version}: {error.message}"
            raise ModelLoadError(why, model=plan.name, version=wanted.version) from error
        self._audit("model.ready", f"{plan.name}:{wanted.version}", admitted.facts())
        return serving(loaded_version(wanted, admitted, served))
