"""Finding policies and choosing among them: built-ins, installed packages, and a module of the user's own.

``load_plugins`` registers, ``choose`` picks. A policy is one plugin's implementation of one hook, and its name is what
stands in the settings:

    built-in           ``latency``          registered as ``offload.latency``: a word may serve several hooks
    installed package  ``only_at_night``    name of its entry point in the group ``disagg``
    own module         ``acme.policies``    dotted path, ``policy.module``: asked first for each hook that it implements

An installed package takes no part until the settings name it: only then is it imported. Importing *this* module loads
nothing.
"""

import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import pluggy
from pydantic import BeforeValidator, Field, WithJsonSchema

from disagg_plugin import builtin_policies, hookspecs
from disagg_plugin.errors import ConfigError
from disagg_plugin.settings_base import SettingsSection

GROUP = "disagg"
PREFIX = "disagg_"
Kind = Literal["offload", "placement", "codec", "admission"]
HOOKS: dict[Kind, str] = {
    "offload": "disagg_decide_offload",
    "placement": "disagg_place_prefill",
    "codec": "disagg_choose_codec",
    "admission": "disagg_admit",
}

Names = Annotated[
    tuple[str, ...],
    Field(min_length=1),
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]


class PolicySettings(SettingsSection):
    """Which policies decide; a list is asked in order, ``None`` of one leaves it to the next."""

    offload: Names = Field(default=("latency",), description="Prefill here or elsewhere: latency, threshold, or yours.")
    placement: Names = Field(
        default=("score",),
        description="Which prefill worker: score, least_loaded, round_robin, power_of_two, or yours.",
    )
    codec: Names = Field(default=("by_link",), description="How KV travels: by_link, or yours.")
    admission: Names = Field(
        default=("projected",), description="Whether to serve at all: projected, current_queue, or yours."
    )
    module: str | None = Field(
        default=None, description="Dotted path of a module of yours, asked first for each hook that it implements."
    )
    hook_timeout_ms: float = Field(
        default=5.0, gt=0, le=1000, description="Longest wait for policies of yours, all hooks of a decision together."
    )
    log_interval_s: float | None = Field(
        default=10.0,
        gt=0,
        description="Log at most one decision in so long, in a form that can be replayed; null: none.",
    )


@dataclass(frozen=True, slots=True)
class Policy:
    """One plugin's implementation of one hook.

    Attributes:
        call: Through pluggy, with the hook's arguments by name; may be anybody's code.
    """

    name: str
    kind: Kind
    builtin: bool
    call: Callable[..., object]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Policies of each kind in the order in which they are asked; the last is always a built-in, which never passes."""

    offload: tuple[Policy, ...]
    placement: tuple[Policy, ...]
    codec: tuple[Policy, ...]
    admission: tuple[Policy, ...]

    def of(self, kind: Kind) -> tuple[Policy, ...]:
        chain: tuple[Policy, ...] = getattr(self, kind)
        return chain


@dataclass(frozen=True, slots=True)
class Installed:
    """One policy that could be named in the settings, or an installed package that cannot be used."""

    name: str
    kinds: tuple[Kind, ...]
    source: str
    problem: str = ""


def load_plugins(
    settings: PolicySettings | None = None, *, extra: Iterable[tuple[str, object]] = ()
) -> pluggy.PluginManager:
    """A manager with the built-ins and whatever the settings name.

    Args:
        extra: Name and object of further plugins, for tests and embedders.

    Raises:
        ConfigError: A named plugin is not there, cannot be imported, or has a hook that nobody would ever call.
    """
    settings = settings or PolicySettings()
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    for name, plugin in builtin_policies.plugins():
        manager.register(plugin, name)
    for name, plugin in extra:
        register(manager, name, plugin)
    for kind in HOOKS:
        for name in getattr(settings, kind):
            if _builtin(manager, kind, name) or manager.has_plugin(name):
                continue
            for entry_point in importlib.metadata.entry_points(group=GROUP, name=name):
                register(manager, name, _loaded(entry_point))
    if settings.module is not None and not manager.has_plugin(settings.module):
        register(manager, settings.module, _imported(settings.module))
    return manager


def choose(manager: pluggy.PluginManager, settings: PolicySettings | None = None) -> Chosen:
    """The chain of policies of each kind, as the settings name them.

    A chain without a built-in at its end gets the default one: somebody has to answer.

    Raises:
        ConfigError: A name is unknown, or a plugin does not implement the hook that it is named for.
    """
    settings = settings or PolicySettings()
    return Chosen(**{kind: _chain(manager, settings, kind) for kind in HOOKS})


def policy_of(manager: pluggy.PluginManager, kind: Kind, name: str) -> Policy:
    """One policy by its name.

    Raises:
        ConfigError: It is not there, or is not one of this kind.
    """
    hook = HOOKS[kind]
    builtin = _builtin(manager, kind, name)
    plugin = builtin or manager.get_plugin(name)
    if plugin is None or hook not in _hooks_of(manager, plugin):
        known = ", ".join(dict.fromkeys([*available(kind), *_foreign(manager)]))
        problem = f"does not implement {hook}" if plugin is not None else "is not installed"
        raise ConfigError(f"policy.{kind} = {name!r}: {problem}; there are {known}")
    implementations = getattr(manager.hook, hook).get_hookimpls()
    caller = manager.subset_hook_caller(hook, [i.plugin for i in implementations if i.plugin is not plugin])
    return Policy(name, kind, builtin is not None, caller)


def available(kind: Kind) -> tuple[str, ...]:
    """Names of the built-ins of ``kind``, then of all installed packages, whatever they implement; imports none."""
    installed = {entry_point.name for entry_point in importlib.metadata.entry_points(group=GROUP)}
    return (*builtin_policies.names(kind), *sorted(installed))


def register(manager: pluggy.PluginManager, name: str, plugin: object) -> None:
    """Register one foreign plugin, or refuse it with one line that says what is wrong with it.

    Raises:
        ConfigError: A hook is misspelt, not marked, takes unknown arguments, is a coroutine or a wrapper; there is
            none at all; or the name is taken.
    """
    if inspect.isclass(plugin):
        raise ConfigError(f"policy {name}: {plugin.__name__} is a class: name an instance of it, or a module")
    for attribute in dir(plugin):
        if attribute.startswith(PREFIX) and manager.parse_hookimpl_opts(plugin, attribute) is None:
            raise ConfigError(f"policy {name}: {attribute} lacks the decorator disagg_plugin.hookspecs.hookimpl")
    try:
        manager.register(plugin, name)
        _verify(manager, name, plugin)
    except (pluggy.PluginValidationError, ValueError) as error:
        raise ConfigError(f"policy {name}: {' '.join(str(error).split())}") from None
    except ConfigError:
        manager.unregister(name=name)
        raise


def _verify(manager: pluggy.PluginManager, name: str, plugin: object) -> None:
    hooks = _hooks_of(manager, plugin)
    known = ", ".join(HOOKS.values())
    if unknown := [hook for hook in hooks if hook not in HOOKS.values()]:
        raise ConfigError(f"policy {name}: there is no hook {unknown[0]}: there are {known}")
    if not hooks:
        raise ConfigError(f"policy {name}: implements none of {known}")
    for hook in hooks:
        for implementation in getattr(manager.hook, hook).get_hookimpls():
            if implementation.plugin is not plugin:
                continue
            if implementation.wrapper or implementation.hookwrapper:
                raise ConfigError(f"policy {name}: {hook} is a wrapper: return None to leave it to the next policy")
            if inspect.iscoroutinefunction(implementation.function):
                raise ConfigError(f"policy {name}: {hook} is a coroutine: must be a plain function")


def installed_policies(*, module: str | None = None) -> list[Installed]:
    """Everything that could be named: built-ins, all installed packages (which this imports), and ``module``.

    A broken package does not raise: its ``problem`` says what is wrong.
    """
    manager = load_plugins()
    found = [Installed(name, (kind,), "built-in") for kind in HOOKS for name in builtin_policies.names(kind)]
    for entry_point in importlib.metadata.entry_points(group=GROUP):
        source = f"{entry_point.dist.name} {entry_point.dist.version}" if entry_point.dist else entry_point.value
        found.append(_inspected(manager, entry_point.name, functools.partial(_loaded, entry_point), source))
    if module is not None:
        found.append(_inspected(manager, module, functools.partial(_imported, module), "policy.module"))
    return found


def _inspected(manager: pluggy.PluginManager, name: str, load: Callable[[], object], source: str) -> Installed:
    try:
        plugin = load()
        register(manager, name, plugin)
    except ConfigError as error:
        return Installed(name, (), source, str(error))
    hooks = _hooks_of(manager, plugin)
    return Installed(name, tuple(kind for kind, hook in HOOKS.items() if hook in hooks), source)


def _chain(manager: pluggy.PluginManager, settings: PolicySettings, kind: Kind) -> tuple[Policy, ...]:
    chain = [policy_of(manager, kind, name) for name in getattr(settings, kind)]
    if settings.module is not None and HOOKS[kind] in _hooks_of(manager, manager.get_plugin(settings.module)):
        chain.insert(0, policy_of(manager, kind, settings.module))
    for position, policy in enumerate(chain[:-1]):
        if policy.builtin:
            raise ConfigError(f"policy.{kind}: {policy.name} always answers: {chain[position + 1].name} is never asked")
    if not chain[-1].builtin:
        chain.append(policy_of(manager, kind, builtin_policies.names(kind)[0]))
    return tuple(chain)


def _builtin(manager: pluggy.PluginManager, kind: Kind, name: str) -> object | None:
    return manager.get_plugin(f"{kind}.{name}") if name in builtin_policies.names(kind) else None


def _foreign(manager: pluggy.PluginManager) -> list[str]:
    ours = {name for name, _ in builtin_policies.plugins()}
    return [name for name, _ in manager.list_name_plugin() if name not in ours]


def _hooks_of(manager: pluggy.PluginManager, plugin: object) -> list[str]:
    return [caller.name for caller in manager.get_hookcallers(plugin) or ()]


def _loaded(entry_point: importlib.metadata.EntryPoint) -> object:
    try:
        plugin: object = entry_point.load()
    except Exception as error:  # noqa: BLE001 - somebody else's module: whatever it raises, the deployment is wrong
        raise ConfigError(
            f"policy {entry_point.name}: {entry_point.value} cannot be imported: {_line(error)}"
        ) from None
    return plugin


def _imported(module: str) -> object:
    try:
        return importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - as above
        raise ConfigError(f"policy.module = {module!r}: cannot be imported: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
