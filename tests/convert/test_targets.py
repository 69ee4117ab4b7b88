"""Programs for chips that are not here: compiled by the real compilers, stored, and read again."""

import pytest

from convert import programs
from convert.chips import Chips
from fastgen_jax.engine import stored
from tests import targets
from tests.tiny import write_config

pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
]
SIZES = {"max_model_len": 256, "num_kv_blocks": 16, "max_num_batched_tokens": 16, "max_num_seqs": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}


@pytest.mark.parametrize(("name", "kind"), [("tpu-v6e-2", "TPU v6 lite"), ("h100", "NVIDIA H100")])
def test_programs_for_an_absent_chip_are_stored_and_read_again(tmp_path, monkeypatch, name, kind):
    chips = Chips.of(name)
    (targets.gpu_target if chips.kind in targets.GPUS else targets.tpu_target)(chips.kind)
    monkeypatch.setattr(stored, "KEY_FILE", tmp_path / "programs.key")
    write_config(tmp_path, **HEADS, hidden_size=512)
    programs.compile_for(chips, tmp_path, SIZES, lambda done, total: None)
    found = stored.find(tmp_path, chips.devices(), is_trusted=False)
    assert found is not None
    assert str(found.made_for["chip"]).startswith(kind)
    assert (found.made_for["chips"], found.made_for["num_kv_blocks"]) == (chips.n, 16)
    assert all(found.read(_Named(shape)) for shape in found.programs)


class _Named:
    """A shape whose text is known."""

    def __init__(self, text: str):
        self._text = text

    def __repr__(self) -> str:
        return self._text
