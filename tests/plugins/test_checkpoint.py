"""Weight files of one's own: every format is read, every fault is named, and no code is run."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from benchbox.api import Model
from benchbox.errors import DataError, OptionError
from benchbox_models.reference import lenet5, wk_net


def checkpoint(
    create_model: Callable[..., Any], weights: str, builder: str = "benchbox_models.reference:wk_net", **options: Any
) -> Model:
    return create_model("checkpoint", builder=builder, weights=weights, **options)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "old.pt", "nested.pt"])
def test_a_checkpoint_is_loaded_from_every_format(
    create_model: Callable[..., Any], tmp_path: Path, suffix: str
) -> None:
    net = wk_net()
    path = tmp_path / f"net.{suffix}"
    match suffix:
        case "safetensors":
            save_file(net.state_dict(), path)
        case "pt":
            torch.save(net.state_dict(), path)
        case "old.pt":
            torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)
        case "nested.pt":
            torch.save({"state_dict": net.state_dict(), "epoch": 3}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()

    plugin = checkpoint(create_model, path.name, sha256=digest)
    model = plugin.load(tmp_path)

    assert all(torch.equal(value, net.state_dict()[name]) for name, value in model.state_dict().items())
    assert plugin.fingerprint(tmp_path) == digest
    assert not model.training


class Malicious:
    """Unpickled, it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("container", ["pickle", "zip", "old"])
def test_code_in_a_weight_file_is_not_run(create_model: Callable[..., Any], tmp_path: Path, container: str) -> None:
    path, target = tmp_path / "weights.pt", tmp_path / "owned"
    content = {"0.weight": Malicious(target)}
    if container == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "zip")

    with pytest.raises(DataError, match=r"holds more than tensors.*nothing in it was run.*Save the weights alone"):
        checkpoint(create_model, "weights.pt").load(tmp_path)

    assert not target.exists()


@pytest.mark.parametrize("name", ["net.safetensors", "net.pt"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_named_as_such(
    create_model: Callable[..., Any], tmp_path: Path, name: str, share: float
) -> None:
    path = tmp_path / name
    save_file(wk_net().state_dict(), path) if path.suffix == ".safetensors" else torch.save(wk_net().state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])

    with pytest.raises(DataError, match=rf"{name}: is cut short or damaged .* Fetch the weights again"):
        checkpoint(create_model, name).load(tmp_path)


def test_a_missing_file_says_where_it_was_looked_for(create_model: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path}/gone.pt: there is no such weight file.*one below {tmp_path}"):
        checkpoint(create_model, "gone.pt").load(tmp_path)


def test_a_misspelt_shipped_name_lists_those_that_exist(create_model: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no such weight file.*one of the names pgd, standard"):
        create_model("digits-cnn", weights="pdg").fingerprint(tmp_path)


def test_a_web_page_in_place_of_weights_is_shown(create_model: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_text("<!DOCTYPE html><title>Not found</title>")

    with pytest.raises(DataError, match=r"net.pt: is neither safetensors nor .*begins with b'<!DOCTYPE html>.*again"):
        checkpoint(create_model, "net.pt").load(tmp_path)


def test_weights_of_another_network_are_listed(create_model: Callable[..., Any], tmp_path: Path) -> None:
    save_file(lenet5().state_dict(), tmp_path / "lenet5.safetensors")

    with pytest.raises(DataError, match=r"of another network: 0.bias is missing; .*; and \d+ more. Check the model"):
        checkpoint(create_model, "lenet5.safetensors").load(tmp_path)


def test_weights_of_other_shapes_are_listed(create_model: Callable[..., Any], tmp_path: Path) -> None:
    state = wk_net().state_dict() | {"7.bias": torch.zeros(5)}
    torch.save(state, tmp_path / "net.pt")

    with pytest.raises(DataError, match=r"another network: 7.bias is \(5,\), the network has \(10,\)"):
        checkpoint(create_model, "net.pt").load(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], {"0.weight": 3}])
def test_a_file_without_a_state_dict_is_refused(create_model: Callable[..., Any], tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "net.pt")

    with pytest.raises(DataError, match=r"net.pt: is no state dict .*torch.save\(model.state_dict"):
        checkpoint(create_model, "net.pt").load(tmp_path)


def test_a_file_with_another_digest_is_refused(create_model: Callable[..., Any], tmp_path: Path) -> None:
    save_file(wk_net().state_dict(), tmp_path / "net.safetensors")

    with pytest.raises(DataError, match=r"net.safetensors: SHA-256 is [0-9a-f]{64}, not 00ff"):
        checkpoint(create_model, "net.safetensors", sha256="00ff").load(tmp_path)


@pytest.mark.parametrize(
    ("builder", "kwargs", "message"),
    [
        ("no_such_package.nets:wk", {}, "cannot be imported.*No module named 'no_such_package'.*PYTHONPATH"),
        ("benchbox_models.reference:wk_nett", {}, "cannot be imported.*no attribute 'wk_nett'"),
        ("torch:__version__", {}, "is a TorchVersion, not callable. Name a function or a class"),
        ("benchbox_models.reference:wk_net", {"depth": 3}, r"does not take these kwargs .*depth.*Its arguments: \(\)"),
        ("builtins:dict", {"a": 1}, "returned dict. It must return a torch.nn.Module"),
    ],
)
def test_a_wrong_builder_is_explained(
    create_model: Callable[..., Any], tmp_path: Path, builder: str, kwargs: Mapping[str, Any], message: str
) -> None:
    save_file(wk_net().state_dict(), tmp_path / "net.safetensors")

    with pytest.raises(DataError, match=rf"builder '{builder}': {message}"):
        checkpoint(create_model, "net.safetensors", builder, kwargs=dict(kwargs)).load(tmp_path)


def test_a_builder_gets_its_kwargs(create_model: Callable[..., Any], tmp_path: Path) -> None:
    save_file(nn.Linear(4, 3).state_dict(), tmp_path / "linear.safetensors")
    kwargs = {"in_features": 4, "out_features": 3}

    model = checkpoint(create_model, "linear.safetensors", "torch.nn:Linear", kwargs=kwargs).load(tmp_path)

    assert model(torch.zeros(2, 4)).shape == (2, 3)


def test_a_builder_is_a_path_to_a_callable(create_model: Callable[..., Any]) -> None:
    with pytest.raises(OptionError, match="pattern"):
        checkpoint(create_model, "net.pt", builder="wk_net")
