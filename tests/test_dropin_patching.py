"""Replacing functions of a live object, and where a drop-in's seed comes from."""

import copy
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import nn

from unmask import dropin
from unmask.dropin import patching, seeds


class Model(nn.Module):
    def sample(self):
        return "theirs"


@dataclass
class Unhashable:
    size: int = 3

    def sample(self):
        return "theirs"


def module():
    made = ModuleType("sampling")
    made.sample = lambda: "theirs"
    return made


def ours(self):
    return f"ours, of {type(self).__name__}"


@pytest.mark.parametrize("make", [Model, Unhashable])
def test_a_method_is_replaced_on_the_object_alone(make):
    obj, other = make(), make()
    before = dict(vars(obj))
    patching.replace(obj, {"sample": ours})
    assert obj.sample() == f"ours, of {make.__name__}" and other.sample() == "theirs"
    assert patching.is_patched(obj) and not patching.is_patched(other)
    patching.restore(obj)
    assert vars(obj) == before and obj.sample() == "theirs" and not patching.is_patched(obj)


def test_what_the_object_itself_held_comes_back():
    obj = Model()
    obj.sample = mine = lambda: "mine"
    patching.replace(obj, {"sample": ours})
    patching.restore(obj)
    assert obj.sample is mine


def test_a_module_gets_functions_without_self():
    sampling = module()
    theirs = sampling.sample
    patching.replace(sampling, {"sample": lambda: "ours"})
    assert sampling.sample() == "ours"
    patching.restore(sampling)
    assert sampling.sample is theirs


def test_a_copy_of_a_patched_object_is_patched_by_itself():
    obj = Model()
    patching.replace(obj, {"sample": lambda self: id(self)})
    twin = copy.deepcopy(obj)
    assert twin.sample() == id(twin)
    patching.restore(twin)
    assert twin.sample() == "theirs" and obj.sample() == id(obj)


def test_mistakes_are_told():
    obj = Model()
    with pytest.raises(ValueError, match=r"obj must be patched, got a Model that is not"):
        patching.restore(obj)
    patching.replace(obj, {"sample": ours})
    with pytest.raises(ValueError, match=r"obj must not be patched already, got a Model with sample replaced"):
        patching.replace(obj, {"sample": ours})
    with pytest.raises(TypeError, match=r"obj must have sample, gather, got a Model without gather"):
        patching.replace(Model(), {"sample": ours, "gather": ours})
    with pytest.raises(TypeError, match=r"obj must be a live object or a module, got class Model"):
        patching.replace(Model, {"sample": ours})
    with pytest.raises(TypeError, match=r"got a int"):
        patching.replace(3, {})


def test_an_unknown_object_is_told_what_would_be_known():
    with pytest.raises(TypeError, match=r"obj must be one of .*; got a Linear"):
        dropin.patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="obj must be patched, got a Linear"):
        dropin.unpatch(nn.Linear(2, 2))


def test_torch_governs_a_seed_that_is_not_given():
    torch.manual_seed(3)
    first, second = seeds.resolve(None), seeds.resolve(None)
    torch.manual_seed(3)
    assert (seeds.resolve(None), seeds.resolve(None)) == (first, second) and first != second
    drawn = [seeds.resolve(None) for _ in range(64)]
    assert min(drawn) >= 0 and 2**62 < max(drawn) < 2**63
    state = torch.get_rng_state()
    assert seeds.resolve(7) == 7 and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(TypeError, match="seed must be an integer"):
        seeds.resolve("7")


def test_a_warning_is_given_once():
    with pytest.warns(UserWarning, match="it is slow"):
        patching.warn_once("it is slow")
    patching.warn_once("it is slow")
