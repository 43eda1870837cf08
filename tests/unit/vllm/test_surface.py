"""What the connector takes from vLLM is what its surface says, and a vLLM that lacks some of it is told in one line."""

import ast
import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from surface_uses import overrides, uncovered, uses

import disagg_vllm
from disagg_plugin.errors import ConfigError
from disagg_plugin.sources import Found, Sources, installed
from disagg_plugin.surface import CHECKED_VARIABLE, Surface, reads
from disagg_vllm import surface
from disagg_vllm.surface import SURFACE

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when vLLM imports its compiler
    from vllm import __version__ as vllm_version
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.metrics.loggers import StatLoggerBase

    from disagg_vllm.stat_logger import DisaggStatLogger

CONNECTOR = Path(disagg_vllm.__file__).parent
LAST_PARTS = {name.path.rpartition(".")[2] for name in SURFACE.names}
ENGINE_TYPES = {name.path.partition(".")[0] for name in SURFACE.names} - {"KVConnectorWorkerMetadata"}  # ours come back


def test_the_installed_vllm_has_all_of_it():
    assert SURFACE.mismatches(installed("vllm"), vllm_version) == []
    assert vllm_version.partition("+")[0] in SURFACE.run


def test_the_connector_names_nothing_of_vllm_that_is_not_listed():
    used = uses(CONNECTOR, "vllm")
    assert used
    assert uncovered(SURFACE, used) == []


def test_it_reads_nothing_of_the_engines_objects_that_is_not_listed():
    """As far as annotations say what is one: the attributes of each parameter that has a type of vLLM."""
    unlisted = {
        f"{file.name}: {ast.unparse(attribute)}"
        for file in CONNECTOR.glob("*.py")
        for parameter, function in annotated_parameters(ast.parse(file.read_text()))
        for attribute in attributes_of(parameter, function)
        if attribute.attr not in LAST_PARTS
    }
    assert unlisted == set()


def annotated_parameters(tree):
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for one in [*function.args.args, *function.args.kwonlyargs]:
                if one.annotation is not None and ast.unparse(one.annotation).strip("'\"") in ENGINE_TYPES:
                    yield one.arg, function


def attributes_of(parameter, function):
    """``a.b`` and ``a.b.c``, but not methods of what is no object of the engine's own, as ``a.names.items()``."""
    called = {node.func for node in ast.walk(function) if isinstance(node, ast.Call)}
    for node in ast.walk(function):
        inner = node
        while isinstance(inner, ast.Attribute):
            inner = inner.value
        if isinstance(node, ast.Attribute) and isinstance(inner, ast.Name) and inner.id == parameter:
            if (
                node in called
                and isinstance(node.value, ast.Attribute)
                and node.attr in dir(dict) + dir(list) + dir(str)
            ):
                continue
            yield node


def test_every_method_of_vllm_that_we_override_is_listed_with_its_parameters():
    sources = Sources("vllm", installed("vllm"))
    exact = {str(name) for name in SURFACE.names if name.match == "exact"}
    theirs = set()
    for base, method in overrides(CONNECTOR, "vllm"):
        module, _, name = base.rpartition(".")
        if isinstance(sources.find(module, f"{name}.{method}"), Found):
            theirs.add(f"{base}.{method}")
    assert len(theirs) > 30
    assert theirs - exact == set()


# -- a vLLM that does not fit --------------------------------------------------------------------------------------


@pytest.fixture
def misfit(monkeypatch):
    """A surface that no vLLM fits."""
    monkeypatch.setenv(CHECKED_VARIABLE, "")
    odd = Surface("vLLM", "vllm", "0.30.0", "0.33.0", (), reads("vllm.v1.request", "Request.moved"))
    monkeypatch.setattr(surface, "SURFACE", odd)


@pytest.mark.usefixtures("misfit")
def test_commands_that_do_not_ask_for_disagg_go_on(monkeypatch, caplog):
    monkeypatch.setattr(KVConnectorFactory, "_registry", dict(KVConnectorFactory._registry))
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "m"])
    disagg_vllm.register()
    (line,) = caplog.messages
    assert "does not fit vLLM" in line
    with pytest.raises(ConfigError, match=r"vllm\.v1\.request\.Request\.moved does not exist"):
        KVConnectorFactory.get_connector_class(KVTransferConfig(kv_connector="disagg", kv_role="kv_both"))


@pytest.mark.usefixtures("misfit")
def test_commands_that_ask_for_it_end_with_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "m", "--kv-connector", "disagg"])
    with pytest.raises(SystemExit, match=r"^disagg does not fit vLLM .* \(supported: 0\.30\.0 to 0\.33\.0\): .*moved"):
        disagg_vllm.register()


@pytest.mark.usefixtures("misfit")
def test_the_stat_logger_of_a_vllm_that_does_not_fit_does_nothing_whatever_is_asked(monkeypatch):
    monkeypatch.setattr(StatLoggerBase, "__abstractmethods__", StatLoggerBase.__abstractmethods__ | {"new_one"})
    monkeypatch.delitem(sys.modules, "disagg_vllm.stat_logger")
    bystander = importlib.import_module("disagg_vllm.stat_logger").DisaggStatLogger
    assert issubclass(bystander, StatLoggerBase)
    logger = bystander(SimpleNamespace(), 0, something="new")
    logger.record(None, None, something="new")
    logger.log_engine_initialized()
    logger.log()


@pytest.mark.parametrize("extra", [None, {}, {"connectors": None}, {"connectors": []}])
def test_the_stat_logger_of_an_engine_without_disagg_does_nothing(extra):
    transfer = SimpleNamespace(kv_connector="NixlConnector", kv_connector_extra_config=extra)
    logger = DisaggStatLogger(SimpleNamespace(kv_transfer_config=transfer))
    logger.record(None, None)
    logger.log()


@pytest.mark.parametrize(
    ("version", "said"),
    [
        pytest.param("0.29.0", "it is older than 0.30.0", id="older than what is supported"),
        pytest.param("0.31.0", "does not exist", id="another one's names"),
    ],
)
def test_a_vllm_that_lacks_everything_is_no_traceback(version, said, tmp_path):
    """A process of its own, whose ``vllm`` has nothing but a version."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop(CHECKED_VARIABLE, None)
    command = [sys.executable, "-c", "import disagg_vllm; disagg_vllm.register()"]
    stock = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert stock.returncode == 0
    (line,) = stock.stderr.splitlines()
    assert "stays out of this vLLM" in line
    asked = subprocess.run(
        [*command, "--kv-connector", "disagg"], env=environment, capture_output=True, text=True, check=False
    )
    assert asked.returncode == 1
    (line,) = asked.stderr.splitlines()
    assert f"does not fit vLLM {version}" in line
    assert said in line
