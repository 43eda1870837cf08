"""The connector inside a vLLM worker: builds the data plane for this rank and steps it with the engine."""

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from disagg_plugin.config import DisaggSettings
from disagg_plugin.kv.dataplane import Completions, DataPlane
from disagg_plugin.kv.geometry import KVGeometry
from disagg_plugin.kv.rank import open_data_plane
from disagg_vllm.kv_views import build_view
from disagg_vllm.lmcache_tier import LMCacheWorker
from disagg_vllm.metadata import RankHandshake, StepCommands, StepReports
from disagg_vllm.support import unsupported_engine

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger("vllm.disagg")

Hook = TypeVar("Hook", bound=Callable[..., Any])


def _guarded(default: Any) -> Callable[[Hook], Hook]:
    """An exception in a worker hook kills the whole engine: stop here, count, say it once, answer ``default``."""

    def wrap(hook: Hook) -> Hook:
        @functools.wraps(hook)
        def guarded(self: "WorkerSide", *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(self, *args, **kwargs)
            except Exception:  # the boundary of a hook: see above
                self.hook_failures += 1
                if self.hook_failures == 1:
                    logger.exception("disagg: the worker hook %s failed; further failures are counted", hook.__name__)
                return default

        return cast("Hook", guarded)

    return wrap


class WorkerSide:
    """One tensor-parallel rank."""

    def __init__(
        self,
        vllm_config: "VllmConfig",
        kv_cache_config: "KVCacheConfig",
        settings: DisaggSettings,
        tier: LMCacheWorker | None = None,
    ) -> None:
        self.tier = tier
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._settings = settings
        self._plane: DataPlane | None = None
        self._geometry: KVGeometry | None = None
        self._problem = unsupported_engine(vllm_config, kv_cache_config) or ""
        self._rank: int = vllm_config.parallel_config.rank
        self._invalid_block_ids: set[int] = set()
        self._said_all = False
        self._step_ended = True
        self.hook_failures = 0

    def register(self, kv_caches: "dict[str, torch.Tensor]") -> None:
        """The engine's caches exist: view them, register memory, compile the codec. A problem is kept, not raised."""
        if self.tier is not None:
            self.tier.register(kv_caches)
        if self._problem:
            return
        try:
            parallel = self._vllm_config.parallel_config
            self._rank = parallel.rank % parallel.tensor_parallel_size
            view = build_view(
                self._vllm_config, self._kv_cache_config, kv_caches, self._rank, parallel.tensor_parallel_size
            )
            self._geometry = view.geometry
            self._plane = open_data_plane(view, self._rank, self._settings)
        except Exception as error:  # whatever is missing or unknown here: serve locally and say why
            logger.debug("disagg: rank %d cannot take part", self._rank, exc_info=True)
            self._problem = f"{type(error).__name__}: {error}"

    def handshake(self) -> RankHandshake:
        """For the scheduler process, once."""
        lmcache_problem = self.tier.child.problem if self.tier is not None else ""
        if self._plane is None:
            problem = self._problem or "the KV caches were never registered"
            return RankHandshake(self._rank, problem=problem, lmcache_problem=lmcache_problem)
        return RankHandshake(self._rank, self._plane.endpoint, self._geometry, lmcache_problem=lmcache_problem)

    @_guarded(None)
    def bind(self, commands: StepCommands) -> None:
        """A step's metadata is there."""
        if self.tier is not None:
            self.tier.bind(commands.tier)

    @_guarded(None)
    def unbind(self) -> None:
        """A step is over."""
        if self.tier is not None:
            self.tier.unbind()

    @_guarded(None)
    def preempt(self, commands: StepCommands) -> None:
        """Blocks of preempted requests are about to be overwritten."""
        if self.tier is not None:
            self.tier.preempt(commands.tier)

    @_guarded(None)
    def begin_step(self, commands: StepCommands, forward_context: "ForwardContext | None" = None) -> None:
        self._step_ended = False
        if self._plane is not None:
            self._plane.apply(commands.commands)
            self._said_all = self._said_all and not commands.commands  # what they change is not in the last report
        if self.tier is not None:
            self.tier.start_loads(forward_context)

    @_guarded(None)
    def end_step(self, commands: StepCommands) -> None:
        """After the forward was launched: export what it computed, scatter what has landed."""
        self._step_ended = True
        if self._plane is not None:
            self._plane.after_forward(computed=commands.computes)
        if self.tier is not None:
            self.tier.start_saves()

    @_guarded((None, None))
    def completions(self, commands: StepCommands) -> tuple[set[str] | None, set[str] | None]:
        """vLLM's form: (requests whose blocks we release, requests whose load ended)."""
        if not self._step_ended and not commands.computes:  # vLLM 0.30: no wait_for_save without a forward
            self.end_step(commands)
        done = self._plane.take_completions() if self._plane is not None else Completions()
        if self.tier is not None:
            done = self.tier.completions(done)
        self._invalid_block_ids |= done.invalid_block_ids
        return set(done.released) or None, set(done.received) or None

    def take_invalid_block_ids(self) -> set[int]:
        taken, self._invalid_block_ids = self._invalid_block_ids, set()
        return taken

    @_guarded(None)
    def report(self, number: int) -> StepReports | None:
        """The end of step ``number``, and what the rank has to say: most steps of a busy engine are not ours."""
        failed = self.tier.take_failed() if self.tier is not None else ()
        problem = self.tier.child.problem if self.tier is not None else ""
        if self._plane is None:
            return StepReports((), number, failed, problem) if self.tier is not None else None
        report = self._plane.report()
        happened = (
            *(report.received, report.receive_failed, report.receive_timings),
            *(report.staged, report.sent, report.send_failed, report.send_timings),
        )
        news = report.busy or any(happened)
        if not news and self._said_all:
            return StepReports((), number, failed, problem)
        self._said_all = not news  # one more report after the last news, so that gauges are seen at rest
        return StepReports((report,), number, failed, problem)

    def close(self) -> None:
        if self._plane is not None:
            self._plane.close()
            self._plane = None
        if self.tier is not None:
            self.tier.child.close()


def any_commands(metadata: Any) -> StepCommands:
    """The step's commands, whatever the engine bound (a stock dummy step binds nothing of ours)."""
    return metadata if isinstance(metadata, StepCommands) else StepCommands()
