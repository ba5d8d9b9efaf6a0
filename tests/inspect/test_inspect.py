"""`moe-llm inspect` on checkpoints built so that the answer is known."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from moe_llm import MoEForCausalLM, cli
from moe_llm.config import ModelConfig
from moe_llm.inspect.inspect import Settings, inspect_checkpoint, without_expert

WORDS = [f"w{i}" for i in range(20)]
HIDDEN = 16


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=23,
        hidden_size=HIDDEN,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )


@torch.no_grad()
def checkpoint(directory: Path, seed: int = 0, planted: bool = False) -> Path:
    """A random model; planted: words of the first half go to expert 2, those of the second to expert 1, in layer 1."""
    torch.manual_seed(seed)
    model = MoEForCausalLM(config())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    if planted:
        model.model.embed_tokens.weight[3:13, 0] = 8
        model.model.embed_tokens.weight[13:, 0] = -8
        gate = model.model.layers[1].mlp.gate.weight
        gate.mul_(0.1)
        gate[2, 0], gate[1, 0] = 4, -4
    model.save_pretrained(directory, tokenizer=tokenizer())
    return directory


def text(path: Path, words: list[str], seed: int, documents: int = 40) -> str:
    draw = random.Random(seed)
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(8, 30)))}) for _ in range(documents)]
    path.write_text("\n".join(lines))
    return str(path)


def test_a_planted_specialisation_is_found(tmp_path):
    saved = checkpoint(tmp_path / "c", planted=True)
    data = [text(tmp_path / "a.jsonl", WORDS[:10], 1), text(tmp_path / "b.jsonl", WORDS[10:], 2)]
    found = inspect_checkpoint(saved, data, Settings(removal_rows=0))
    special = found["specialisation"]
    assert special["p_value"][1] == special["overall_p_value"] == 0.001
    assert special["bits"][1] > 20 * special["chance_bits"][1]
    by_source = np.array(found["by_source"][1])
    assert by_source[2].tolist() == [pytest.approx(0.5, abs=0.05), pytest.approx(0, abs=0.1)]
    assert by_source[1].tolist() == [pytest.approx(0, abs=0.1), pytest.approx(0.5, abs=0.05)]
    best = found["top_tokens"][1][2]
    assert {token["text"] for token in best[:8]} <= set(WORDS[:10])
    assert found["removal"] is None


def test_none_is_found_in_sources_that_are_alike(tmp_path):
    values = []
    for seed in range(5):
        saved = checkpoint(tmp_path / f"c{seed}", seed)
        data = [text(tmp_path / f"{seed}{name}.jsonl", WORDS, 10 * seed + i) for i, name in enumerate("ab")]
        found = inspect_checkpoint(saved, data, Settings(removal_rows=0, permutations=199))
        values.append(found["specialisation"]["overall_p_value"])
    assert min(values) > 0.01
    assert np.mean(values) > 0.2


class Masked(torch.nn.Module):
    """transformers' router without one expert."""

    def __init__(self, gate, expert):
        super().__init__()
        self.gate, self.expert = gate, expert

    def forward(self, x):
        logits = torch.nn.functional.linear(x.reshape(-1, HIDDEN), self.gate.weight).float()
        logits[:, self.expert] = -torch.inf
        weights, chosen = logits.softmax(-1).topk(2)
        return logits, weights / weights.sum(-1, keepdim=True), chosen


def test_the_cost_of_removal_is_that_of_transformers_with_the_expert_masked(tmp_path):
    saved = checkpoint(tmp_path / "c")
    data = [text(tmp_path / "a.jsonl", WORDS, 3, documents=5), text(tmp_path / "b.jsonl", WORDS, 4, documents=5)]
    found = inspect_checkpoint(saved, data, Settings(removal_rows=3))
    theirs = MixtralForCausalLM.from_pretrained(saved, experts_implementation="eager").eval()
    words = tokenizer()
    rows = [
        [1, *words(json.loads(line)["text"], add_special_tokens=False)["input_ids"], 2]
        for path in data
        for line in Path(path).read_text().splitlines()[:3]
    ]

    @torch.no_grad()
    def loss() -> float:
        total = sum(theirs(torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1) for row in rows)
        return (total / sum(len(row) - 1 for row in rows)).item()

    whole = loss()
    assert found["removal"]["loss"] == pytest.approx(whole, abs=1e-5)
    assert found["removal"]["tokens"] == sum(len(row) - 1 for row in rows)
    for layer in range(2):
        gate = theirs.model.layers[layer].mlp.gate
        for expert in range(4):
            theirs.model.layers[layer].mlp.gate = Masked(gate, expert)
            assert found["removal"]["cost"][layer][expert] == pytest.approx(loss() - whole, abs=2e-5)
        theirs.model.layers[layer].mlp.gate = gate
    assert np.abs(found["removal"]["cost"]).max() > 1e-3


def test_a_removed_expert_comes_back(tmp_path):
    model = MoEForCausalLM.from_pretrained(checkpoint(tmp_path / "c"))
    ids = torch.randint(3, 23, (2, 9))
    before = model(ids).logits
    with without_expert(model, 0, 1):
        assert not torch.allclose(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)


def test_what_transformers_saves_is_read_and_pieces_of_a_document_are_counted_whole(tmp_path):
    torch.manual_seed(0)
    MixtralForCausalLM(
        MixtralConfig(
            vocab_size=23,
            hidden_size=16,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            max_position_embeddings=64,
        )
    ).save_pretrained(tmp_path / "c")
    tokenizer().save_pretrained(tmp_path / "c")
    data = text(tmp_path / "a.jsonl", WORDS, 1)
    reports = [inspect_checkpoint(tmp_path / "c", [data], Settings(length=n, removal_rows=0)) for n in (64, 7)]
    tokens = sum(len(json.loads(line)["text"].split()) + 2 for line in Path(data).read_text().splitlines())
    assert [r["sources"][0]["tokens"] for r in reports] == [tokens] * 2
    assert reports[0]["tokens_by_position"] == reports[1]["tokens_by_position"]
    few = inspect_checkpoint(tmp_path / "c", [data], Settings(max_tokens=50, removal_rows=0))
    assert few["sources"][0]["tokens"] == 50


def test_files_of_a_report(tmp_path, capsys):
    saved = checkpoint(tmp_path / "c")
    odd = tmp_path / "b.txt"
    odd.write_text("w1 </script> w2 <b> " * 20)
    out = tmp_path / "out"
    data = [text(tmp_path / "a.jsonl", WORDS, 1, 5), str(odd)]
    assert cli.main(["inspect", str(saved), "--data", *data, "--json", "--out", str(out), "--removal-rows", "1"]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((out / "inspect.json").read_text())
    assert {key: value for key, value in written.items() if key != "shown"} == printed
    names = {"load", "sources", "repetition", "specialisation", "removal", "together"}
    assert {path.stem for path in (out / "plots").glob("*.png")} == names
    page = (out / "inspect.html").read_text()
    assert page.count("</script>") == 2
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/png;base64,") == len(names)
    inline = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert inline["shown"] == written["shown"]
    assert {row["source"] for row in inline["shown"]} == {0, 1}
    row = inline["shown"][0]
    assert np.array(row["experts"]).shape == (2, len(row["tokens"]), 2)
    assert cli.main(["inspect", str(saved), "--data", *data]) == 0
    told = capsys.readouterr().out
    assert "specialisation by source" in told
    assert "too few" not in told
    few = ["--max-tokens", "20", "--removal-rows", "0"]
    assert cli.main(["inspect", str(saved), "--data", data[0], *few]) == 0
    told = capsys.readouterr().out
    assert "bits and p compare sources of text, and here is one: name a second with --data" in told
    assert [line.split()[2:4] + line.split()[-1:] for line in told.splitlines()[-2:]] == [["-"] * 3] * 2
    assert cli.main(["inspect", str(saved), "--data", *data, *few]) == 0
    assert "too few documents to tell bits from chance" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["no checkpoint", "architecture", "missing", "binary", "short", "twice", "out"])
def test_mistakes_are_one_sentence(tmp_path, capsys, case):
    saved, data, extra, word = checkpoint(tmp_path / "c"), tmp_path / "a.txt", [], ""
    data.write_text("w1 w2 " * 40)
    paths = [str(data)]
    if case == "no checkpoint":
        saved, word = tmp_path / "nowhere", "does not exist"
    elif case == "architecture":
        content = json.loads((saved / "config.json").read_text()) | {"model_type": "llama"}
        (saved / "config.json").write_text(json.dumps(content))
        word = "llama"
    elif case == "missing":
        paths, word = [str(tmp_path / "none.txt")], "none.txt does not exist"
    elif case == "binary":
        data.write_bytes(bytes(range(256)))
        word = "not UTF-8"
    elif case == "short":
        data.write_text("w1 w2")
        word = "too few"
    elif case == "twice":
        paths, word = [str(data)] * 2, "given twice"
    else:
        extra, word = ["--out", str(data)], "--out"
    assert cli.main(["inspect", str(saved), "--data", *paths, *extra]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert word in err
