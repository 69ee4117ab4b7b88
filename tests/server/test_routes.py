"""Models, tokenising, health."""

import jinja2
import openai
import pytest

from tests.server.fake_engine import MAX_TOKENS
from tests.server.running import CHAT, TEXT
from tests.tiny_tokenizers import BOS, EOS


class TestOtherRoutes:
    def test_models_are_listed_and_shown(self, client):
        (model,) = client.models.list().data
        assert (model.id, model.object, model.owned_by) == ("fake", "model", "fastgen_jax")
        shown = model.model_dump()
        assert (shown["max_model_len"], shown["root"], shown["parent"]) == (
            MAX_TOKENS,
            "fake",
            None,
        )
        (permission,) = shown["permission"]
        assert (permission["id"], permission["allow_sampling"]) == ("modelperm-fake", True)
        assert client.models.retrieve("fake").id == "fake"
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("org/other")
        assert caught.value.code == "model_not_found"

    def test_a_model_of_the_hub_says_where_its_tokenizer_is(self, up, client, monkeypatch):
        monkeypatch.setattr(up.service, "hub_id", "org/name")
        (model,) = client.models.list().data
        assert (model.id, model.model_dump()["root"]) == ("fake", "org/name")

    def test_an_unknown_model_is_a_404_and_an_alias_is_not(self, client):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.completions.create(model="other", prompt="x")
        assert client.completions.create(model="./fake", prompt="x").choices

    def test_tokenize_and_detokenize_are_inverse(self, up, tokenizer):
        answer = up.post("/tokenize", {"prompt": TEXT, "return_token_strs": True}).json()
        assert answer["tokens"] == tokenizer.encode(TEXT)
        assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), MAX_TOKENS)
        assert "".join(answer["token_strs"][1:]) == TEXT
        text = up.post("/detokenize", {"tokens": answer["tokens"][1:]}).json()["prompt"]
        assert text == TEXT

    def test_tokenize_renders_messages(self, up, tokenizer):
        ids = up.post("/tokenize", {"messages": CHAT}).json()["tokens"]
        assert ids == tokenizer.apply_chat_template(CHAT)

    def test_a_remote_tokenizer_is_a_local_one(self, up, tokenizer):
        """As lm-eval's uses the three routes."""
        info = up.get("/tokenizer_info").json()
        assert (info["bos_token"], info["eos_token"]) == (BOS, EOS)
        assert info.keys() >= {"pad_token", "chat_template", "tokenizer_class"}

        def encode(text: str) -> list[int]:
            return up.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()[
                "tokens"
            ]

        assert encode(info["eos_token"]) == [tokenizer.eos_token_id]
        template = jinja2.Template(info["chat_template"])
        tokens = {name: info[name] for name in ("bos_token", "eos_token")}
        text = template.render(messages=CHAT, add_generation_prompt=True, **tokens)
        assert encode(text) == up.post("/tokenize", {"messages": CHAT}).json()["tokens"]
        assert up.post("/detokenize", {"tokens": encode(text)}).json()["prompt"] == text

    @pytest.mark.parametrize(("path", "body"), [
        ("/tokenize", {}), ("/tokenize", {"prompt": "a", "messages": []}),
        ("/tokenize", {"prompt": 1}),
        ("/detokenize", {"tokens": [10**9]}), ("/detokenize", {"tokens": "x"}), ("/detokenize", {}),
    ])  # fmt: skip
    def test_bad_token_requests_are_400(self, up, path, body):
        assert up.post(path, body).status_code == 400

    def test_version_and_documentation(self, up):
        assert up.get("/version").json()["version"]
        assert "/v1/chat/completions" in up.get("/openapi.json").json()["paths"]
        assert "$defs" not in up.get("/openapi.json").text
        assert up.get("/docs").status_code == 200

    def test_no_request_can_add_a_metric_series(self, up):
        n_before = len(up.get("/metrics").text.splitlines())
        for i in range(20):
            up.get(f"/path-{i}")
            up.post("/v1/completions", {"prompt": "a", "model": f"model-{i}"})
        assert len(up.get("/metrics").text.splitlines()) == n_before
