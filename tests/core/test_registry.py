"""The registry: what is installed is found, with where it came from; what is broken is reported and stops nothing."""

from __future__ import annotations

import datetime
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import pytest
from pydantic import BaseModel, Field

from benchbox import api
from benchbox.domain import Component
from benchbox.errors import OptionError, PluginError
from benchbox.hookspecs import hookimpl
from benchbox.registry import Broken, Registry

ATTACK = """
from benchbox import api
from benchbox.hookspecs import hookimpl

class {title}(api.BudgetAttack):
    name, norms = "{name}", ("linf",)

    def perturb(self, model, x, y, threat, rng):
        return x

@hookimpl
def benchbox_attacks():
    return [{title}]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``install(distribution, module, source)``: a distribution with one module and an entry point of that name."""

    def install(
        distribution: str, module: str, source: str, version: str = "1.2", entry: str = "plugin", attribute: str = ""
    ) -> None:
        site = tmp_path / distribution
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[benchbox]\n{entry} = {module}{attribute}\n")
        (site / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install


class Nothing(api.BudgetAttack):
    """An attack that does nothing, with an option of each sort."""

    name, norms = "nothing", ("linf",)

    class Options(api.Options):
        steps: int = Field(40, ge=1)
        step_size: float | None = Field(None, gt=0)
        loss: Literal["ce", "margin"] = "ce"
        parts: tuple[int, ...] = ()
        extra: dict[str, Any] = Field(default_factory=dict)

    def perturb(self, model: Any, x: Any, y: Any, threat: Any, rng: Any) -> Any:
        return x


def attacks(*classes: Any) -> ModuleType:
    """A plugin module whose hook returns ``classes``."""
    return module(benchbox_attacks=lambda: list(classes))


def module(**hooks: Callable[..., Any]) -> ModuleType:
    plugin = ModuleType("plugin")
    for name, function in hooks.items():
        setattr(plugin, name, hookimpl(function))
    return plugin


def no_plugins() -> list[Any]:
    return []


def registry_of(plugin: object, provider: str = "acme") -> Registry:
    registry = Registry()
    registry.register(plugin, provider, "1.0")
    return registry


# ---------------------------------------------------------------------------------------------- discovery


def test_an_installed_distribution_is_found_with_its_provenance(install: Callable[..., None]) -> None:
    install("acme-attacks", "acme_found", ATTACK.format(title="Found", name="found"), version="3.4.5")

    offer = Registry.discover().get("attack", "found")

    assert (offer.kind, offer.name, offer.provider, offer.provider_version) == (
        "attack", "found", "acme-attacks", "3.4.5"
    )  # fmt: skip
    assert issubclass(offer.plugin, api.BudgetAttack)


def test_built_in_plugins_come_the_same_way() -> None:
    assert Registry.discover().get("attack", "pgd").provider == "benchbox"


def test_an_entry_point_may_name_an_object_in_a_module(install: Callable[..., None]) -> None:
    source = (
        ATTACK.format(title="Inner", name="inner")
        + """
class Plugin:
    benchbox_attacks = staticmethod(benchbox_attacks)

plugin = Plugin()
"""
    )
    install("acme-objects", "acme_object", source, attribute=":plugin")

    registry = Registry.discover()

    assert registry.get("attack", "inner").provider == "acme-objects"


def test_modules_are_registered_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loose_attack.py").write_text(ATTACK.format(title="Loose", name="loose"))
    monkeypatch.syspath_prepend(tmp_path)

    assert Registry.discover(modules=["loose_attack"]).get("attack", "loose").provider == "loose_attack"


@pytest.mark.parametrize("blocked", ["acme-attacks", "acme-entry", "acme_blocked"])
def test_distributions_entry_points_and_modules_can_be_blocked(install: Callable[..., None], blocked: str) -> None:
    install("acme-attacks", "acme_blocked", ATTACK.format(title="Blocked", name="blocked"), entry="acme-entry")

    registry = Registry.discover(blocked=[blocked])

    assert "blocked" not in [offer.name for offer in registry.offers("attack")]
    assert "blocked" in [offer.name for offer in Registry.discover().offers("attack")]


def test_a_blocked_module_of_the_settings_is_left_out() -> None:
    registry = Registry.discover(modules=["no_such_module"], blocked=["no_such_module"])

    assert registry.broken == []


def test_discovery_loads_no_torch() -> None:
    code = "import sys; from benchbox.registry import Registry; Registry.discover(); print('torch' in sys.modules)"

    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert answer.stdout.strip() == "False"


# ---------------------------------------------------------------------------------------------- what is broken


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "import a_package_that_is_missing",
            "ModuleNotFoundError: No module named 'a_package_that_is_missing'. Install it",
        ),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_a_plugin_that_fails_to_import_is_reported_and_stops_nothing(
    install: Callable[..., None], source: str, reason: str
) -> None:
    install("acme-broken", "acme_broken", source)
    install("zeta-works", "zeta_works", ATTACK.format(title="Works", name="works"))

    registry = Registry.discover()

    (broken,) = registry.broken
    assert broken.provider == "acme-broken"
    assert "importing 'acme_broken' raised" in broken.reason
    assert reason in broken.reason
    assert registry.get("attack", "works").provider == "zeta-works"


def test_a_hook_that_raises_is_reported_once_and_hides_no_other() -> None:
    registry = registry_of(module(benchbox_attacks=lambda: 1 / 0, benchbox_metrics=no_plugins))
    registry.register(attacks(Nothing), "other")

    names = [[offer.name for offer in registry.offers("attack")] for _ in range(2)]
    registry.register(module(), "third")  # makes the registry look again
    registry.offers("attack")

    assert names == [["nothing"], ["nothing"]]
    assert registry.broken == [Broken("acme", "benchbox_attacks raised ZeroDivisionError: division by zero")]


class NoBase:
    name = "no-base"


class BadName(Nothing):
    name = "Bad_Name"


class NoName(api.BudgetAttack):
    norms = ("linf",)

    def perturb(self, model: Any, x: Any, y: Any, threat: Any, rng: Any) -> Any:
        return x


class NoMethod(api.BudgetAttack):
    name, norms = "no-method", ("linf",)


class NoNorms(api.BudgetAttack):
    name = "no-norms"

    def perturb(self, model: Any, x: Any, y: Any, threat: Any, rng: Any) -> Any:
        return x


class TextNorms(Nothing):
    name = "text-norms"
    norms: ClassVar[Any] = "linf"


class OddNorms(Nothing):
    name = "odd-norms"
    norms: ClassVar[Any] = ("linf", "l3")


class LooseOptions(Nothing):
    name = "loose-options"

    class Options(BaseModel):
        steps: int = 1


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (NoBase, "is no subclass of benchbox.api.Attack"),
        (Nothing(Nothing.Options()), "is no subclass of benchbox.api.Attack"),
        (api.Metric, "is no subclass of benchbox.api.Attack"),
        (BadName, "BadName.name is 'Bad_Name'; a kebab-case name is needed, such as 'my-attack'"),
        (NoName, "NoName.name is None"),
        (NoMethod, "NoMethod does not define perturb"),
        (NoNorms, "NoNorms does not say its norms"),
        (TextNorms, "TextNorms.norms is 'linf'; a tuple of linf, l2, l1, l0 is needed"),
        (OddNorms, "OddNorms.norms is ('linf', 'l3')"),
        (LooseOptions, "LooseOptions.Options must derive from benchbox.api.Options"),
    ],
)
def test_a_class_that_is_no_plugin_is_reported_and_those_beside_it_stay(broken: Any, reason: str) -> None:
    registry = registry_of(attacks(broken, Nothing))

    offers = registry.offers("attack")

    assert [offer.plugin for offer in offers] == [Nothing]
    (report,) = registry.broken
    assert report.provider == "acme"
    assert report.reason.startswith("benchbox_attacks: ")
    assert reason in report.reason


@pytest.mark.parametrize("returned", [Nothing, None, "nothing", {"nothing": Nothing}])
def test_a_hook_that_returns_no_list_is_reported(returned: Any) -> None:
    registry = registry_of(module(benchbox_attacks=lambda: returned))

    assert registry.offers("attack") == []
    assert registry.broken[0].reason.endswith("; it must return a list of classes")


def test_a_misspelt_hook_is_reported_with_the_right_name() -> None:
    registry = registry_of(module(benchbox_atacks=lambda: [Nothing]))

    assert registry.broken == [
        Broken("acme", "implements the unknown hook 'benchbox_atacks'. Did you mean 'benchbox_attacks'?")
    ]


def test_a_forgotten_marker_is_reported() -> None:
    plugin = ModuleType("plugin")
    plugin.benchbox_attacks = lambda: [Nothing]  # type: ignore[attr-defined]

    assert "benchbox_attacks without @hookimpl" in registry_of(plugin).broken[0].reason


def test_a_hook_may_have_another_name_when_it_says_which_it_is() -> None:
    plugin = ModuleType("plugin")
    plugin.mine = hookimpl(specname="benchbox_attacks")(lambda: [Nothing])  # type: ignore[attr-defined]

    assert registry_of(plugin).get("attack", "nothing").plugin is Nothing


def test_a_hook_with_arguments_that_it_never_gets_is_reported_and_nothing_of_it_stays() -> None:
    registry = registry_of(module(benchbox_attacks=lambda: [Nothing], benchbox_defenses=lambda model: []))

    assert registry.offers("attack") == []
    assert "benchbox_defenses" in registry.broken[0].reason
    assert "model" in registry.broken[0].reason


def test_a_module_named_twice_is_reported_and_works_once() -> None:
    plugin = attacks(Nothing)
    registry = registry_of(plugin)
    registry.register(plugin, "acme-again")

    assert registry.get("attack", "nothing").provider == "acme"
    assert registry.broken == [Broken("acme-again", "'acme-again' is registered already; name it once")]


# ---------------------------------------------------------------------------------------------- by name


@pytest.mark.parametrize("order", [("benchbox", "zeta"), ("alpha", "benchbox")])
def test_two_offers_of_one_name_are_an_error_that_names_both_and_blocks_the_guest(order: tuple[str, str]) -> None:
    registry = Registry()
    for provider in order:
        registry.register(attacks(Nothing), provider)

    with pytest.raises(PluginError, match=r"attack 'nothing' is offered by '(\w+)' and '(\w+)'") as caught:
        registry.get("attack", "nothing")

    guest = next(provider for provider in order if provider != "benchbox")
    assert all(repr(provider) in str(caught.value) for provider in order)
    assert f'block = ["{guest}"] in benchbox.toml' in str(caught.value)
    assert caught.value.exit_code == 3
    assert len(registry.offers("attack")) == 2


def test_a_guest_cannot_replace_a_built_in_unnoticed(install: Callable[..., None]) -> None:
    install("acme-attacks", "acme_pgd", ATTACK.format(title="Mine", name="pgd"))

    with pytest.raises(PluginError, match="attack 'pgd' is offered by 'acme-attacks' and 'benchbox'"):
        Registry.discover().get("attack", "pgd")
    assert Registry.discover(blocked=["acme-attacks"]).get("attack", "pgd").provider == "benchbox"


def test_one_provider_with_one_name_twice_is_told_so() -> None:
    registry = registry_of(attacks(Nothing, type("Again", (Nothing,), {})))

    with pytest.raises(PluginError, match=r"offered twice by 'acme': by .*\.Nothing and .*\.Again\. Rename"):
        registry.get("attack", "nothing")


def test_one_name_may_be_used_by_several_kinds() -> None:
    class Same(api.Metric):
        name = "nothing"

        def score(self, record: Any) -> Any:
            return {}

    registry = registry_of(module(benchbox_attacks=lambda: [Nothing], benchbox_metrics=lambda: [Same]))

    assert registry.get("attack", "nothing").plugin is Nothing
    assert registry.get("metric", "nothing").plugin is Same


@pytest.mark.parametrize("name", ["notin", "NOTHING", "nothin"])
def test_an_unknown_name_suggests_the_nearest(name: str) -> None:
    with pytest.raises(PluginError, match=f"unknown attack '{name}'. Did you mean 'nothing'?"):
        registry_of(attacks(Nothing)).get("attack", name)


def test_an_unknown_name_that_is_near_to_none_lists_all() -> None:
    registry = registry_of(attacks(Nothing))

    with pytest.raises(PluginError, match=r"unknown attack 'xyz'\. Known: nothing\."):
        registry.get("attack", "xyz")
    with pytest.raises(PluginError, match=r"unknown weight perturbation 'xyz'\. Known: none\."):
        registry.get("weight_perturbation", "xyz")


# ---------------------------------------------------------------------------------------------- options


def test_options_are_validated_and_defaults_filled_in() -> None:
    attack = registry_of(attacks(Nothing)).create("attack", "nothing", {"steps": 3, "step_size": 1})

    assert attack.options == Nothing.Options(steps=3, step_size=1.0, loss="ce", parts=())
    assert isinstance(attack.options.step_size, float)


def test_a_toml_list_becomes_a_tuple() -> None:
    attack = registry_of(attacks(Nothing)).create("attack", "nothing", {"parts": [3, 1, 2]})

    assert attack.options.parts == (3, 1, 2)


@pytest.mark.parametrize(
    ("options", "option", "message"),
    [
        ({"step": 3}, "step", "'nothing' has no option 'step'. Did you mean 'steps'?"),
        ({"q": 3}, "q", "'nothing' has no option 'q'. Its options: steps, step_size, loss, parts, extra."),
        ({"steps": "40"}, "steps", "valid integer (got '40')"),
        ({"steps": 2.0}, "steps", "(got 2.0)"),
        ({"steps": True}, "steps", "(got True)"),
        ({"steps": 0}, "steps", "greater than or equal to 1 (got 0)"),
        ({"step_size": -0.1}, "step_size", "greater than 0 (got -0.1)"),
        ({"step_size": float("nan")}, "step_size", "NaN and infinity are no options; give finite numbers (got nan)"),
        ({"step_size": float("inf")}, "step_size", "give finite numbers (got inf)"),
        ({"extra": {"deep": float("nan")}}, "extra", "give finite numbers"),
        ({"extra": {"when": datetime.date(2024, 1, 1)}}, "extra", "give a number, a text, a list or a table"),
        ({"loss": "dlr"}, "loss", "'ce' or 'margin' (got 'dlr')"),
        ({"parts": [1, "2"]}, "parts.1", "valid integer (got '2')"),
        ({"parts": 1}, "parts", "(got 1)"),
    ],
)  # fmt: skip
def test_wrong_options_are_named_with_what_is_wrong(options: dict[str, Any], option: str, message: str) -> None:
    registry = registry_of(attacks(Nothing))

    with pytest.raises(OptionError) as caught:
        registry.create("attack", "nothing", options)

    assert caught.value.option == option
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_option_is_named() -> None:
    class Needy(Nothing):
        name = "needy"

        class Options(api.Options):
            target: str

    with pytest.raises(OptionError, match="'needy' needs the option 'target'") as caught:
        registry_of(attacks(Needy)).create("attack", "needy", {})

    assert caught.value.option == "target"


def test_a_component_holds_everything_that_identifies_a_plugin(tmp_path: Path) -> None:
    class Printed(Nothing):
        name, version = "printed", 7

        def fingerprint(self, data_dir: Path) -> str:
            return f"print of {data_dir.name}"

    registry = registry_of(attacks(Printed))
    instance = registry.create("attack", "printed", {"parts": [1]})

    component = registry.component("attack", "printed", instance, tmp_path)

    options = {"steps": 40, "step_size": None, "loss": "ce", "parts": [1], "extra": {}}
    assert component == Component("attack", "acme", "printed", 7, options, f"print of {tmp_path.name}")


def test_observers_come_with_their_provider() -> None:
    seen: list[Any] = []
    registry = registry_of(module(benchbox_cell_finished=lambda event: seen.append(event)))

    ((provider, observe),) = registry.observers()
    observe("an event")

    assert (provider, seen) == ("acme", ["an event"])
