import pytest
import torch
from own_code import install, install_package
from small_networks import batch, vit

import gmarpp
from gmarpp.attribution import GMARPlusPlus, Rollout, resolve_method
from gmarpp.labels import method_color, method_label


def flat(model, images, target):
    return torch.ones(len(images), 4, 4)


def other(model, images, target):
    return torch.zeros(len(images), 4, 4)


def test_a_registered_method_is_known_by_its_name():
    gmarpp.register_method(Rollout(alpha=0.5, name="half_rollout", label="Half rollout"))
    images = batch()[0]
    found = gmarpp.explain(vit(), images, ["half_rollout", "rollout"]).maps
    expected = gmarpp.explain(vit(), images, Rollout(alpha=0.5)).maps["rollout"]
    torch.testing.assert_close(found["half_rollout"], expected)
    assert not torch.allclose(found["rollout"], expected)
    assert method_label("half_rollout") == "Half rollout"


def test_a_color_of_ones_own_is_used():
    gmarpp.register_method(gmarpp.FunctionMethod("flat", flat, color="#0a0b0c"))
    assert method_color("flat") == "#0a0b0c"
    assert method_label("flat") == "flat"


def test_methods_without_a_color_get_different_ones():
    names = [f"flat_{number}" for number in range(5)]
    for name in names:
        gmarpp.register_method(gmarpp.FunctionMethod(name, flat))
    known = [*gmarpp.METHODS, *gmarpp.VARIANTS, *names]
    assert len({method_color(name) for name in known}) == len(known)


def test_the_same_may_be_registered_again_and_another_may_not():
    gmarpp.register_method(gmarpp.FunctionMethod("flat", flat))
    gmarpp.register_method(gmarpp.FunctionMethod("flat", flat))
    gmarpp.register_method(Rollout())
    with pytest.raises(ValueError, match=r"'flat' is the name of another method.*replace=True"):
        gmarpp.register_method(gmarpp.FunctionMethod("flat", other))
    gmarpp.register_method(gmarpp.FunctionMethod("flat", other), replace=True)
    assert not gmarpp.explain(vit(), batch()[0], "flat").maps["flat"].any()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Rollout(alpha=2.0), "'rollout' is the name of another method, or of the same with other options"),
        (GMARPlusPlus(alpha=2.0, name="strong"), r"strong: 'GMAR\+\+ \(L1\)' is the label of gmarpp_l1"),
        (gmarpp.FunctionMethod("gmar++", flat), "name of a method: expected a small letter"),
        (gmarpp.FunctionMethod("a/b", flat), "got 'a/b'"),
        (gmarpp.FunctionMethod("../up", flat), "got '../up'"),
        (gmarpp.FunctionMethod("Saliency", flat), "got 'Saliency'"),
        (gmarpp.FunctionMethod("fractions", flat), "none of index, fractions"),
        (gmarpp.FunctionMethod("mine", flat, label="a\nb"), "mine: label: expected up to 60 printable"),
        (gmarpp.FunctionMethod("mine", flat, color="red"), "mine: color: expected #rrggbb"),
        (gmarpp.FunctionMethod, "expected an object of a Method, .* got FunctionMethod"),
        (flat, "got function"),
    ],
)
def test_what_cannot_be_registered_is_named(method, message):
    with pytest.raises(ValueError, match=message):
        gmarpp.register_method(method, replace=True)


def test_a_packages_methods_are_imported_when_their_name_is_used(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install_package(tmp_path, "own_package_of_methods"))
    with pytest.raises(ValueError, match=r"unknown method 'darkness': choose from .*random.*, brightness, gmar\+\+"):
        resolve_method("darkness")
    images = batch()[0]
    found = gmarpp.explain(vit(), images, ["brightness"])
    expected = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 8)[:, 0]
    torch.testing.assert_close(found.maps["brightness"], expected)
    assert found.signed_methods == ("brightness",)


def test_a_package_that_does_not_register_what_it_announces_is_named(tmp_path, monkeypatch):
    folder = install(tmp_path, "own_empty_package", "", "[gmarpp.methods]\nnothing = own_empty_package\n")
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(ValueError, match=r"announces the method 'nothing', but own_empty_package does not register it"):
        gmarpp.explain(vit(), batch()[0], "nothing")


def test_two_packages_that_announce_one_name_are_named(tmp_path, monkeypatch):
    for name in ("own_first", "own_second"):
        install(tmp_path, name, "", f"[gmarpp.methods]\nsame = {name}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"'same' in gmarpp\.methods, got own_first and own_second"):
        resolve_method("same")
