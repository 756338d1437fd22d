"""Identity: what is in a cell's key and what is not. The pinned digests guard every database that exists."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchbox.domain import Cell, Component, Threat, format_eps
from benchbox.identity import canonical_json, derive_seed, digest


def component(kind: str, name: str, **options: object) -> Component:
    return Component(kind, "benchbox", name, 1, options, "f00d")  # type: ignore[arg-type]


CLEAN = Cell(component("dataset", "digits"), component("model", "cnn"), None, None, None, None, None, None, 100)
ATTACKED = replace(
    CLEAN, attack=component("attack", "pgd", steps=40), threat=Threat("linf", 8 / 255), seed=0,
)  # fmt: skip
DEFENDED = replace(
    ATTACKED, defense=component("defense", "mask", fraction=0.1), access="adaptive", batch_size=250,
)  # fmt: skip
TRANSFERRED = replace(ATTACKED, access="transfer", source=component("model", "mlp"))
LIMITED = replace(ATTACKED, max_passes=100)
CURVED = replace(ATTACKED, threat=Threat("linf", 8 / 255, curve=(4 / 255, 8 / 255)))


@pytest.mark.parametrize(
    ("cell", "key"),
    [
        (CLEAN, "5611a31b5b51a696b602866f25dc6c37281c275097b6ad12289cffc7db7a1bca"),
        (ATTACKED, "0e0fd0a78efd209c2927f8c1d29db756fba591b7b396675f2e2fa48d1290e4de"),
        (DEFENDED, "eaa2c3b7ddeae52296b4717a3383e01c2f0e184039fe189df8bae3b7a02dedd7"),
        (TRANSFERRED, "13f59e2f3f770db6fbc789dbf98feee427208ef98a302ef41d2e44884a053281"),
        (LIMITED, "e00560097c1cb7f4651602628b6209820bef71c6b62a4e1ef30cba8a9b67db8c"),
        (CURVED, "97e2831e28c936eff4183a3c00d0e348494e7944be8c4d06bf076eb9b6113b09"),
    ],
)
def test_keys_are_pinned(cell: Cell, key: str) -> None:
    """If this fails, every stored result is orphaned: raise CELL_VERSION only when results really change."""
    assert cell.key == key


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": component("dataset", "mnist")},
        {"model": replace(CLEAN.model, fingerprint="beef")},
        {"model": replace(CLEAN.model, version=2)},
        {"model": replace(CLEAN.model, provider="somebody-else")},
        {"attack": component("attack", "pgd", steps=41)},
        {"threat": Threat("l2", 8 / 255)},
        {"threat": Threat("linf", 8 / 255, targeted=True)},
        {"seed": 1},
        {"examples": 99},
        {"access": "oblivious"},
        {"weight_perturbation": component("weight_perturbation", "noise")},
        {"source": component("model", "mlp")},
        {"max_passes": 100},
        {"threat": Threat("linf", 8 / 255, curve=(4 / 255, 8 / 255))},
    ],
)
def test_everything_that_can_change_a_result_changes_the_key(change: dict[str, object]) -> None:
    assert replace(DEFENDED, **change).key != DEFENDED.key  # type: ignore[arg-type]


def test_what_came_later_is_in_the_identity_only_where_it_is_used() -> None:
    """So that results of before keep their keys."""
    assert not {"source", "max_passes"} & set(DEFENDED.identity())
    assert set(Threat("linf", 0.1).identity()) == {"norm", "eps", "targeted"}


def test_a_label_says_whose_examples_they_are_what_they_may_cost_and_on_which_curve() -> None:
    item = replace(TRANSFERRED, max_passes=100, threat=CURVED.threat)

    assert item.label == (
        "digits · cnn · pgd linf 8/255 (curve of 2 to 8/255) · transfer from mlp · at most 100 passes"
    )


def test_the_order_of_options_does_not_matter() -> None:
    forth = component("attack", "pgd", steps=40, restarts=2)
    back = component("attack", "pgd", restarts=2, steps=40)

    assert forth.digest == back.digest


def test_canonical_json_has_one_form_and_refuses_nan() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "σ"}) == '{"a":"σ","b":[1,2.5,null]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_digest_is_sha256_of_the_canonical_json() -> None:
    # printf '{}' | sha256sum
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_seeds_are_63_bits_and_depend_on_every_part() -> None:
    seeds = {derive_seed("attack", 0), derive_seed("attack", 1), derive_seed("defense", 0)}

    assert len(seeds) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("eps", "text"), [(8 / 255, "8/255"), (0.3, "0.3"), (1.5, "1.5"), (77 / 255, "77/255"), (0.123456, "0.123456")]
)
def test_radii_are_written_as_people_write_them(eps: float, text: str) -> None:
    assert format_eps(eps) == text
