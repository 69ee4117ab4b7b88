"""Names of tensors: whoever saved or wrapped a model, its tensors are found."""

import pytest

from fastgen_jax.checkpoints.names import adapter, canonical, split
from fastgen_jax.models import families

Q = "model.layers.0.self_attn.q_proj.weight"
LLAMA = ("model.embed_tokens.weight", Q, "model.norm.weight", "lm_head.weight")


def known(model_type: str) -> list[str]:
    family = families.family(model_type)
    return [*family.WEIGHTS, *family.IGNORED]


def stored(name: str) -> str:
    """As a file would have it: the first layer, the first expert."""
    return name.replace("{n_layers}", "2").replace("{}", "0").replace("*", "x.weight")


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
@pytest.mark.parametrize(
    "wrap",
    [
        "{}",  # as it is
        "module.{}",  # DDP
        "_orig_mod.{}",  # torch.compile
        "module._orig_mod.{}",
        "base_model.model.{}",  # peft, merged
        "language_model.{}",  # the language model of one that also sees
        "model.language_model.{}",
    ],
)
def test_wrapped_names_of_every_family_are_its_own(family, wrap):
    names = [stored(name) for name in known(family)]
    found, problems = canonical([wrap.format(name) for name in names], known(family))
    assert found == {name: wrap.format(name) for name in names}
    assert problems == []


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_names_of_a_model_without_its_head_are_found(family):
    names = [stored(name) for name in known(family)]
    bare = {name: ".".join(split(name)[1]) for name in names}
    found, problems = canonical(bare.values(), known(family))
    assert found == bare
    assert problems == []


@pytest.mark.parametrize(
    "name",
    [
        "model._orig_mod.layers.0.self_attn.q_proj.weight",
        "model.layers.0._orig_mod.self_attn.q_proj.weight",
        "_fsdp_wrapped_module.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "model.text_model.layers.0.self_attn.q_proj.weight",
    ],
)
def test_wrappers_in_the_middle_of_names_are_left_out(name):
    assert canonical([name], LLAMA) == ({Q: name}, [])


@pytest.mark.parametrize(
    "name",
    [
        "model.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",
        "language_model.model.rotary_emb_local.inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "layers.0.self_attn.rotary_emb.sin_cached",
        "transformer.rotary_pos_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
    ],
)
def test_tables_of_rotations_are_nothing_to_load(name):
    assert canonical([name], LLAMA) == ({}, [])


def test_two_tensors_of_one_name_are_a_problem_that_names_both():
    wrapped = "_orig_mod." + Q
    found, problems = canonical([Q, wrapped, "lm_head.weight"], LLAMA)
    assert found == {Q: Q, "lm_head.weight": "lm_head.weight"}
    assert problems == [f"twice: {Q} and {wrapped} are both {Q}"]


def test_other_parts_of_a_model_are_left_out_by_name_alone():
    names = ["vision_tower.layers.0.q.weight", "model.vision_tower.x", "model.vision_towers.x"]
    others = {"vision_tower"}
    assert canonical(names, LLAMA, others) == (
        {"model.vision_towers.x": "model.vision_towers.x"},
        [],
    )
    assert set(canonical(names, LLAMA)[0]) == {*names}


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.lm_head.modules_to_save.default.weight",
        "model.layers.0.self_attn.q_proj.lora_magnitude_vector",
    ],
)
def test_adapters_are_recognised(name):
    assert adapter([*LLAMA, name]) == name
    assert adapter(LLAMA) is None
